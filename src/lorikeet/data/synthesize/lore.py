"""Meanings of words, sums and dates, reviews with a clear opinion, and everyday notes."""

from __future__ import annotations

import datetime

from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.layouts import Task, informal, render
from lorikeet.data.synthesize.lexicon import list_pairs, sections

DEFINITIONS, CATEGORIES = list_pairs("definitions"), list_pairs("categories")
SYNONYMS = [line.split(", ") for _, lines in sections("lists", "synonyms") for line in lines]
OPPOSITES = [
    (line.split(", ")[0], line.split(", ")[1]) for _, lines in sections("lists", "opposites") for line in lines
]
POSITIVE, NEGATIVE, NEUTRAL = (dict(sections("lists", name)) for name in ("positive", "negative", "neutral"))
SUBJECTS = [subject for subject in POSITIVE if subject != "any"]
NOTES = [line for _, lines in sections("lists", "notes") for line in lines]


def words(w: Writer) -> str:
    return w.pick((_definitions, _synonyms, _synonyms, _opposites, _categories, _categories, _members))(w)


def _definitions(w: Writer) -> str:
    chosen = w.sample(DEFINITIONS, w.between(2, 5))
    if w.chance(0.5):
        return w.pick(("\n", " ")).join(
            [
                w.pick(
                    (
                        f"{word.capitalize()}: {text}.",
                        f"A {word} is {text}.",
                        f'What does "{word}" mean? It is {text}.',
                        f"{word} - {text}",
                        f"The word for {text} is {word}.",
                    )
                )
                for word, text in chosen
            ]
        )
    return render(
        w,
        Task(
            ("What does the word mean?", "(Define|Explain) the word[ in a few words]."),
            chosen,
            ("Word", "Term"),
            ("Meaning", "Definition"),
        ),
    )


def _synonyms(w: Writer) -> str:
    lines = []
    for group in w.sample(SYNONYMS, w.between(2, 6)):
        a, b, *rest = w.sample(group, w.between(2, 4))
        lines.append(
            w.pick(
                (
                    f"{a} means {b}",
                    f"{a} = {b}",
                    f"Another word for {a} is {b}.",
                    f"Synonyms of {a}: {', '.join([b, *rest])}",
                    f'Instead of "{a}" you can say "{b}".',
                    f"{a.capitalize()} and {b} mean nearly the same.",
                    f"{a} ~ {', '.join([b, *rest])}",
                )
            )
        )
    return "\n".join(lines)


def _opposites(w: Writer) -> str:
    pairs = [pair if w.chance(0.5) else (pair[1], pair[0]) for pair in w.sample(OPPOSITES, w.between(3, 8))]
    if w.chance(0.5):
        return "\n".join(
            [
                w.pick(
                    (f"The opposite of {a} is {b}.", f"{a} <-> {b}", f"not {a}: {b}", f"If it is not {a}, it is {b}.")
                )
                for a, b in pairs
            ]
        )
    return render(
        w, Task(("(Give|Write) the opposite.", "What is the opposite?"), pairs, ("Word",), ("Opposite", "Antonym"))
    )


def _categories(w: Writer) -> str:
    lines = []
    for name, slot in w.sample(CATEGORIES, w.between(2, 5)):
        values = w.several(slot, w.between(3, 7))
        lines.append(
            w.pick(
                (
                    f"{name}: {', '.join(values)}",
                    f"{name.capitalize()} such as {', '.join(values[:-1])} and {values[-1]}",
                    f"{', '.join(values)} are all {name}.",
                    f"Examples of {name}: {'; '.join(values)}",
                    f"{values[0]}, {values[1]} -> {name}",
                )
            )
        )
    return "\n".join(lines)


def _members(w: Writer) -> str:
    chosen = w.sample(CATEGORIES, w.between(2, 5))
    pairs = [(w.slot(slot), name) for name, slot in chosen for _ in range(w.between(1, 2))]
    page = render(
        w,
        Task(
            ("(Sort|Put) into groups.", "Which group is it?", "What kind of thing is this?"),
            w.shuffled(pairs),
            ("Item", "Word"),
            ("Group", "Category", "Kind"),
        ),
    )
    return (
        page
        if w.chance(0.5)
        else f"{w.pick(('Groups', 'Kinds', 'Categories'))}: {', '.join(n for n, _ in chosen)}\n\n{page}"
    )


def reviews(w: Writer) -> str:
    """Opinions with their polarity, in words, stars, numbers or labels."""
    names = w.pick(
        (
            ("positive", "negative", "neutral", "mixed"),
            ("Positive", "Negative", "Neutral", "Mixed"),
            ("good", "bad", "so-so", "good and bad"),
            ("happy", "unhappy", "undecided", "divided"),
            ("5", "1", "3", "3"),
            ("★★★★★", "★", "★★★", "★★★"),
            ("pos", "neg", "neu", "both"),
            ("thumbs up", "thumbs down", "so-so", "it depends"),
            ("POSITIVE", "NEGATIVE", "NEUTRAL", "MIXED"),
            ("+", "-", "0", "+-"),
        )
    )
    pairs = []
    for _ in range(w.between(1, 5)):
        polarity = w.pick((0, 0, 0, 1, 1, 1, 2, 3, 3))
        pairs.append((review(w, polarity), names[polarity]))
    if len(pairs) == 1 and w.chance(0.5):
        text, name = pairs[0]
        return w.pick(
            (
                f"{w.say('{person}')} - {name}\n{text}",
                f"Review of {w.slot('restaurant')} ({w.slot('date')})\n{text}\nRating: {name}",
                f"{text}\nIn one word: {name}",
                f"{name}: {text}",
            )
        )
    return render(
        w,
        Task(
            (
                "What is the (sentiment|opinion|tone)?",
                "(Classify|Rate|Judge) the (review|opinion|comment).",
                "Does the writer like it?",
                "How does the (customer|reviewer) feel?",
            ),
            pairs,
            ("Review", "Text", "Comment", "Feedback", "Opinion"),
            ("Sentiment", "Rating", "Feeling", "Label"),
        ),
    )


def review(w: Writer, polarity: int) -> str:
    """A review for (0), against (1), without opinion (2), or both for and against (3)."""
    subject = w.pick(SUBJECTS)
    if polarity == 3:
        return _divided(w, subject)
    parts = (POSITIVE, NEGATIVE, NEUTRAL)[polarity]
    lines = []
    for template in w.sample(parts[subject] + parts["any"], w.between(1, 3)):
        lines.append(w.sentence(template))
    if polarity != 2 and w.chance(0.15):
        other = (NEGATIVE if polarity == 0 else POSITIVE)[subject]
        lines.insert(
            0,
            w.sentence(w.pick(other)).rstrip(".!")
            + ", but overall "
            + w.pick(
                ("I loved it.", "it was great.", "we will be back.")
                if polarity == 0
                else ("I was disappointed.", "it was bad.", "never again.")
            ),
        )
    text = " ".join(lines)
    return text if w.chance(0.8) else informal(w, text.rstrip("."))


def _divided(w: Writer, subject: str) -> str:
    first, second = w.shuffled([POSITIVE, NEGATIVE])
    said = [w.sentence(w.pick(first[subject])), w.say(w.pick(second[subject])).rstrip(".!")]
    joint = w.pick((" But ", " However, ", " Still, ", " On the other hand, ", " That said, ", " Then again, "))
    if w.chance(0.3):
        return f"{said[0]} {said[1][:1].upper()}{said[1][1:]}."
    return f"{said[0]}{joint}{said[1]}."


def notes(w: Writer) -> str:
    """Posts, diary lines, messages and small news with names in them."""
    name = w.slot("given")
    lines = [w.sentence(template).replace("NAME", name) for template in w.sample(NOTES, w.between(2, 6))]
    kind = w.random()
    if kind < 0.4:
        return " ".join(lines)
    if kind < 0.6:
        return f"{w.slot('weekday')}, {w.slot('date')}\n" + " ".join(lines)
    if kind < 0.8:
        friend = w.slot("given")
        return "\n".join([f"{(name, friend)[index % 2]}: {informal(w, line)}" for index, line in enumerate(lines)])
    greeting, farewell = w.pick(("Hi", "Dear", "Hello")), w.pick(("Best", "Love", "See you", "Cheers", "Regards"))
    return f"{greeting} {w.slot('given')},\n\n{' '.join(lines)}\n\n{farewell},\n{name}"


def sums(w: Writer) -> str:
    return w.pick((_arithmetic, _arithmetic, _stories, _dates, _comparisons, _sequences))(w)


def _arithmetic(w: Writer) -> str:
    top = w.pick((10, 20, 100, 1000))
    sign = w.pick("++--*")
    lines = []
    for _ in range(w.between(4, 10)):
        a, b = w.between(0, top), w.between(0, top if sign != "*" else 12)
        if sign == "-" and b > a:
            a, b = b, a
        value = a + b if sign == "+" else a - b if sign == "-" else a * b
        word = {"+": "plus", "-": "minus", "*": "times"}[sign]
        lines.append(
            w.pick(
                (
                    f"{a} {sign} {b} = {value}",
                    f"{a} {sign} {b} = {value}",
                    f"{a}{sign}{b}={value}",
                    f"What is {a} {word} {b}? {value}",
                    f"{a} {word} {b} is {value}",
                )
            )
        )
    return "\n".join(lines)


def _stories(w: Writer) -> str:
    lines = []
    for _ in range(w.between(1, 3)):
        name, other, thing = w.slot("given"), w.slot("given"), w.slot(w.pick(("fruit", "animal_plural", "vegetable")))
        a, b = w.between(2, 30), w.between(1, 30)
        if w.chance(0.5):
            asked = w.pick(("How many are there now?", f"How many {thing} does {name} have?"))
            lines.append(f"{name} has {a} {thing} and {other} gives {name} {b} more. {asked}")
            lines[-1] += f" {a} + {b} = {a + b}, so {a + b} {thing}."
        else:
            a += b
            verb = w.pick(("sold", "lost", "ate", f"gave {other}"))
            asked = w.pick(("How many are left?", f"How many {thing} remain?"))
            lines.append(f"{name} had {a} {thing} and {verb} {b}. {asked}")
            lines[-1] += f" {a} - {b} = {a - b}, so {a - b} {thing}."
    return "\n".join(lines)


def _dates(w: Writer) -> str:
    lines = []
    for _ in range(w.between(2, 5)):
        day = datetime.date(w.between(1990, 2035), w.between(1, 12), w.between(1, 28))
        later = w.between(1, 30)
        after = day + datetime.timedelta(days=later)
        long = f"{day.day} {day:%B %Y}"
        lines.append(
            w.pick(
                (
                    f"{long} as ISO date: {day.isoformat()}",
                    f"{day.isoformat()} is a {day:%A}.",
                    f"{later} days after {day.isoformat()} is {after.isoformat()}.",
                    f"{day:%d/%m/%Y} = {long}",
                    f'{long} -> {{"day": {day.day}, "month": {day.month}, "year": {day.year}}}',
                    f"The day after {day:%A} is {day + datetime.timedelta(days=1):%A}.",
                    f"The month after {day:%B} is {day + datetime.timedelta(days=31 - day.day + 3):%B}."
                    if day.day > 3
                    else f"{day:%B} is month number {day.month}.",
                )
            )
        )
    return "\n".join(lines)


def _comparisons(w: Writer) -> str:
    lines = []
    for _ in range(w.between(2, 5)):
        values = [w.between(0, w.pick((20, 100, 5000))) for _ in range(w.between(2, 5))]
        shown = ", ".join(map(str, values))
        lines.append(
            w.pick(
                (
                    f"{shown}: the largest is {max(values)}",
                    f"Smallest of {shown}: {min(values)}",
                    f"Sort {shown} -> {', '.join(map(str, sorted(values)))}",
                    f"{shown}; sum {sum(values)}",
                    f"Is {values[0]} more than {values[1]}? {'Yes' if values[0] > values[1] else 'No'}.",
                )
            )
        )
    return "\n".join(lines)


def _sequences(w: Writer) -> str:
    lines = []
    for _ in range(w.between(2, 5)):
        start, step = w.between(0, 60), w.pick((1, 2, 3, 4, 5, 10, 25, 100))
        row = [start + index * step for index in range(w.between(4, 9))]
        lines.append(
            w.pick(
                (
                    ", ".join(map(str, row)),
                    f"{', '.join(map(str, row[:-1]))}, next: {row[-1]}",
                    f"From {row[0]} to {row[-1]} in steps of {step}: {' '.join(map(str, row))}",
                )
            )
        )
    return "\n".join(lines)
