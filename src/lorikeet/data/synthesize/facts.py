"""Facts to a sentence and back: places to eat, hotels, products, people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.layouts import Task, object_text, render
from lorikeet.data.synthesize.records import Record, as_brackets, as_form

_PRICES = ("cheap", "moderate", "high", "expensive", "less than £20", "£20-25", "more than £30", "low-cost", "average")
_RATINGS = (
    "low",
    "average",
    "high",
    "1 out of 5",
    "2 out of 5",
    "3 out of 5",
    "4 out of 5",
    "5 out of 5",
    "excellent",
    "poor",
    "four stars",
    "one star",
)
_CHILDREN = {
    "yes": ("family friendly", "child friendly", "good for children", "welcoming to families", "kid friendly"),
    "no": ("not family friendly", "not for children", "adults only", "not child friendly", "not a place for kids"),
}


def _eatery(w: Writer) -> Record:
    data = {"name": w.slot("restaurant")}
    for key, chance, slot in (
        ("eatType", 0.6, "eat_type"),
        ("food", 0.6, "cuisine"),
        ("area", 0.5, "area"),
        ("near", 0.4, "restaurant"),
    ):
        if w.chance(chance):
            data[key] = w.slot(slot)
    if w.chance(0.5):
        data["priceRange"] = w.pick(_PRICES)
    if w.chance(0.5):
        data["customer rating"] = w.pick(_RATINGS)
    if w.chance(0.4):
        data["familyFriendly"] = w.pick(("yes", "no"))
    if len(data) < 3:
        data["food"], data["area"] = w.slot("cuisine"), w.slot("area")
    return data


def _price_words(w: Writer, price: str) -> str:
    if "£" in price:
        return w.pick((f"has a price range of {price}", f"charges {price}", f"has prices of {price}"))
    return w.pick((f"has {price} prices", f"has a {price} price range", f"is in the {price} price range"))


def _rating_words(w: Writer, rating: str) -> str:
    if "of" in rating:
        return w.pick((f"is rated {rating}", f"has a customer rating of {rating}", f"gets {rating} from its customers"))
    return w.pick((f"has a {rating} customer rating", f"has {rating} ratings", f"gets {rating} reviews from customers"))


def _eatery_text(w: Writer, d: Record) -> str:
    name, kind = d["name"], d.get("eatType", w.pick(("place", "restaurant", "venue")))
    where = [f"in the {d['area']}"] if "area" in d else []
    where += [w.pick(("near ", "close to ", "next to ", "not far from ", "by ")) + d["near"]] if "near" in d else []
    place = " ".join(w.shuffled(where))
    left = {key: value for key, value in d.items() if key not in ("name", "eatType", "area", "near")}
    phrase = _noun_phrase(w, kind, left)
    extra = []
    if "food" in left:
        food = left["food"]
        extra.append(
            w.pick((f"serves {food} food", f"offers {food} dishes", f"has {food} cuisine", f"sells {food} food"))
        )
    if "priceRange" in left:
        extra.append(_price_words(w, left["priceRange"]))
    if "customer rating" in left:
        extra.append(_rating_words(w, left["customer rating"]))
    if "familyFriendly" in left:
        extra.append(f"is {w.pick(_CHILDREN[left['familyFriendly']])}")
    extra = w.shuffled(extra)
    if extra and w.chance(0.15):
        return _subject_last(w, name, phrase, place, extra)
    return _joined(w, _opening(w, name, phrase, place), extra)


def _noun_phrase(w: Writer, kind: str, left: Record) -> str:
    """The kind with some of the facts before it; those are taken out of ``left``."""
    words = [kind]
    if "food" in left and w.chance(0.4):
        words.insert(0, left.pop("food"))
    if left.get("familyFriendly") == "yes" and w.chance(0.4):
        del left["familyFriendly"]
        words.insert(0, w.pick(("family friendly", "child friendly", "kid friendly", "family-friendly")))
    price = left.get("priceRange", "£")
    if "£" not in price and w.chance(0.4):
        words.insert(
            0, {"high": "high priced", "moderate": "moderately priced", "average": "averagely priced"}.get(price, price)
        )
        del left["priceRange"]
    if left.get("customer rating", "of") in ("low", "high", "average") and w.chance(0.2):
        words.insert(0, f"{left.pop('customer rating')} rated")
    text = " ".join(words)
    return f"{'an' if text[0].lower() in 'aeio' else 'a'} {text}"


def _opening(w: Writer, name: str, phrase: str, place: str) -> str:
    if not place:
        return w.pick(
            (f"{name} is {phrase}", f"There is {phrase} called {name}", f"You can eat at {phrase} named {name}")
        )
    upper = place[:1].upper() + place[1:]
    return w.pick(
        (
            f"{name} is {phrase} {place}",
            f"{name} is {phrase} located {place}",
            f"{name}, {place}, is {phrase}",
            f"There is {phrase} {place} called {name}",
            f"{upper} is {phrase} called {name}",
            f"{upper} you can find {phrase} named {name}",
            f"{upper}, {name} is {phrase}",
            f"Located {place}, {name} is {phrase}",
            f"The {phrase.partition(' ')[2]} {name} is {place}",
        )
    )


def _subject_last(w: Writer, name: str, phrase: str, place: str, extra: Sequence[str]) -> str:
    wanted = f"{phrase} that {' and '.join(extra)}"
    return w.pick(
        (f"If you want {wanted}, try {name}", f"For {wanted}, go to {name}", f"Looking for {wanted}? Visit {name}")
    ) + (f" {place}." if place else ".")


def _joined(w: Writer, opening: str, extra: Sequence[str]) -> str:
    if not extra:
        return opening + "."
    subject = w.pick(("It", "It", "The place"))
    if len(extra) == 1:
        return w.pick(
            (f"{opening} and {extra[0]}.", f"{opening}. {subject} {extra[0]}.", f"{opening} that {extra[0]}.")
        )
    head = w.pick((f"{opening}. {subject} {extra[0]}", f"{opening} and {extra[0]}", f"{opening} which {extra[0]}"))
    middle = "".join(f"{w.pick(('. It ', ', '))}{part}" for part in extra[1:-1])
    return f"{head}{middle}{w.pick((' and ', '. It also ', '. It '))}{extra[-1]}."


def _filled(w: Writer, slots: Sequence[tuple[str, str]]) -> Record:
    chosen = [slots[0], *[slot for slot in slots[1:] if w.chance(0.7)]]
    return {key: w.slot(slot) for key, slot in chosen}


def _hotel(w: Writer) -> Record:
    return _filled(
        w, (("name", "company"), ("city", "town"), ("stars", "few"), ("price", "amount"), ("near", "street"))
    )


def _hotel_text(w: Writer, d: Record) -> str:
    extra = [f"has {d['stars']} stars"] if "stars" in d else []
    extra += [w.pick((f"costs {d['price']} a night", f"charges {d['price']} per night"))] if "price" in d else []
    extra += [w.pick((f"lies near {d['near']}", f"is a short walk from {d['near']}"))] if "near" in d else []
    return _joined(w, f"{d['name']} is a hotel" + (f" in {d['city']}" if "city" in d else ""), w.shuffled(extra))


def _product(w: Writer) -> Record:
    return _filled(
        w,
        (
            ("name", "invented"),
            ("kind", "product"),
            ("colour", "colour"),
            ("maker", "company"),
            ("price", "amount"),
            ("code", "code"),
        ),
    )


def _product_text(w: Writer, d: Record) -> str:
    kind = d.get("kind", "product")
    colour = d.get("colour", "")
    phrase = f"{colour} {kind}".strip()
    extra = [w.pick((f"costs {d['price']}", f"is sold for {d['price']}"))] if "price" in d else []
    extra += [w.pick((f"is made by {d['maker']}", f"comes from {d['maker']}"))] if "maker" in d else []
    extra += [f"has the code {d['code']}"] if "code" in d else []
    return _joined(w, f"The {d['name']} is {'an' if phrase[0] in 'aeiou' else 'a'} {phrase}", w.shuffled(extra))


def _biography(w: Writer) -> Record:
    return _filled(
        w,
        (
            ("name", "person"),
            ("job", "job"),
            ("born", "year"),
            ("birthplace", "town"),
            ("employer", "company"),
            ("hobby", "hobby"),
            ("language", "language"),
        ),
    )


def _biography_text(w: Writer, d: Record) -> str:
    job = d.get("job", "person")
    extra = [f"was born in {d['born']}"] if "born" in d else []
    extra += [f"comes from {d['birthplace']}"] if "birthplace" in d else []
    extra += [f"works for {d['employer']}"] if "employer" in d else []
    extra += [w.pick((f"enjoys {d['hobby']}", f"likes {d['hobby']}"))] if "hobby" in d else []
    extra += [f"speaks {d['language']}"] if "language" in d else []
    return (
        _joined(w, f"{d['name']} is {'an' if job[0] in 'aeiou' else 'a'} {job}", w.shuffled(extra))
        .replace(" which ", " who ")
        .replace(". The place ", ". This person ")
    )


_KINDS: Sequence[tuple[str, Callable[[Writer], Record], Callable[[Writer, Record], str]]] = (
    ("restaurant", _eatery, _eatery_text),
    ("restaurant", _eatery, _eatery_text),
    ("restaurant", _eatery, _eatery_text),
    ("hotel", _hotel, _hotel_text),
    ("product", _product, _product_text),
    ("person", _biography, _biography_text),
)


def data_to_text(w: Writer) -> str:
    kind, make, tell = w.pick(_KINDS)
    form = w.pick((as_brackets, as_brackets, as_form, object_text))
    pairs = []
    back = w.chance(0.25)
    for _ in range(w.between(1, 3)):
        data = make(w)
        shown = dict(w.shuffled(list(data.items()))) if w.chance(0.3) else data
        facts, text = form(w, shown), tell(w, data)
        pairs.append((text, facts) if back else (facts, text))
        if not back and w.chance(0.25):
            pairs.append((facts, tell(w, data)))
    if back:
        return render(
            w,
            Task(
                (f"(Extract|List|Find) the facts about the {kind}.", "What (facts|data) does the text give?"),
                pairs,
                ("Text", "Description", "Sentence"),
                ("Facts", "Data", "Record", "MR"),
            ),
        )
    return render(
        w,
        Task(
            (
                f"(Describe|Write about|Tell me about|Introduce) the {kind}.",
                "(Write|Make) a sentence (from|with|about) (the|these) facts.",
                "Put the (data|facts) into words.",
            ),
            pairs,
            ("Facts", "Data", "MR", "Record", "Input"),
            ("Text", "Description", "Sentence", "Output"),
        ),
    )
