"""Composed names, codes, amounts, dates: so many different ones that they can be copied but not memorised."""

from __future__ import annotations

from lorikeet.data.synthesize.grammar import Slot, Writer

_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_ALPHANUMERIC = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"
_HEX = "0123456789abcdef"
_DIGITS = "0123456789"
_TLDS = ("com", "org", "net", "co.uk", "io", "example", "de", "info")


def syllables(w: Writer, low: int = 1, high: int = 3) -> str:
    """An invented lower-case word."""
    onset, nucleus, coda = w.lexicon["onset"], w.lexicon["nucleus"], w.lexicon["coda"]
    return "".join([onset(w) + nucleus(w) + (coda(w) if w.random() < 0.5 else "") for _ in range(w.between(low, high))])


def invented(w: Writer) -> str:
    return syllables(w, 2, 3).capitalize()


def surname(w: Writer) -> str:
    kind = w.random()
    if kind < 0.4:
        return w.slot("last_name")
    if kind < 0.75:
        return invented(w)
    return w.slot("place_head") + w.slot("place_tail")


def given(w: Writer) -> str:
    return w.slot("first_name") if w.random() < 0.75 else syllables(w, 1, 2).capitalize()


def person(w: Writer) -> str:
    kind = w.random()
    if kind < 0.85:
        return f"{given(w)} {surname(w)}"
    if kind < 0.93:
        return f"{given(w)} {w.pick(_LETTERS)}. {surname(w)}"
    return f"{given(w)} {surname(w)}-{surname(w)}"


def town(w: Writer) -> str:
    kind = w.random()
    if kind < 0.35:
        return w.slot("city")
    if kind < 0.75:
        return w.slot("place_head") + w.slot("place_tail")
    if kind < 0.9:
        return invented(w)
    return w.pick(("San ", "Port ", "Fort ", "Lake ", "Mount ", "Saint ", "El ", "Los ", "Bad ", "Great ")) + invented(
        w
    )


def _compound(w: Writer) -> str:
    return w.slot("title_adjective") + w.slot("title_noun").lower()


def _village(w: Writer) -> str:
    return w.slot("place_head") + w.slot("place_tail")


def company(w: Writer) -> str:
    makers: tuple[Slot, ...] = (invented, surname, invented, _compound)
    head = w.pick(makers)(w)
    return head if w.random() < 0.35 else f"{head} {w.slot('company_kind')}"


def restaurant(w: Writer) -> str:
    kind = w.random()
    if kind < 0.3:
        return f"{w.slot('venue_head')} {w.slot('venue_noun')}"
    if kind < 0.45:
        return f"{given(w)}'s {w.slot('venue_tail')}"
    if kind < 0.6:
        return f"{invented(w)} {w.slot('venue_tail')}"
    if kind < 0.75:
        return invented(w)
    if kind < 0.9:
        return f"The {w.slot('title_adjective')} {w.slot('venue_noun')}"
    return f"{w.slot('venue_noun')} & {w.slot('venue_noun')}"


def title(w: Writer) -> str:
    """The title of a song, a book, a film."""
    adjective, noun = w.slot("title_adjective"), w.slot("title_noun")
    kind = w.between(0, 11)
    if kind == 0:
        return f"The {noun} of {invented(w)}"
    if kind == 1:
        return f"{w.slot('title_verb')} the {noun}" if w.chance(0.3) else f"{w.slot('title_verb')} With Me"
    if kind == 2:
        return f"{noun} in the {w.slot('title_noun')}"
    if kind == 3:
        return f"The {w.slot('title_noun')} and the {noun}"
    if kind == 4:
        return f"{adjective} {noun}s"
    if kind == 5:
        return (
            f"{w.slot('title_verb')} {w.pick(('Tonight', 'Again', 'Forever', 'Tomorrow', 'Alone', 'for Me', 'to You'))}"
        )
    if kind == 6:
        return f"My {adjective} {noun}"
    if kind == 7:
        return f"{invented(w)}"
    if kind == 8:
        return f"{given(w)} and the {adjective} {noun}"
    if kind == 9:
        return f"One {noun} for {given(w)}"
    return f"The {adjective} {noun}" if w.chance(0.6) else f"{adjective} {noun}"


def artist(w: Writer) -> str:
    kind = w.random()
    if kind < 0.6:
        return person(w)
    if kind < 0.75:
        return f"The {w.slot('title_adjective')} {w.slot('title_noun')}s"
    if kind < 0.85:
        return f"{invented(w)} {w.slot('band_tail')}"
    return invented(w)


def playlist(w: Writer) -> str:
    kind = w.between(0, 6)
    if kind == 0:
        return (
            f"{w.slot('music_genre').title()} {w.pick(('Classics', 'Party', 'Mix', 'Gold', 'Anthems', 'Essentials'))}"
        )
    if kind == 1:
        return f"{w.slot('weekday')} {w.pick(('Morning', 'Chill', 'Drive', 'Workout', 'Vibes', 'Dinner'))}"
    if kind == 2:
        return f"{given(w)}'s {w.pick(('Favourites', 'Mix', 'Picks', 'Jams'))}"
    if kind == 3:
        return w.pick(("chill", "evening", "study", "sleep", "road trip", "gym", "party", "summer", "focus")) + w.pick(
            (" beats", " hits", " mix", " songs", " time", " sounds", "")
        )
    if kind == 4:
        return f"{w.slot('title_adjective')} {w.pick(('Hits', 'Tunes', 'Nights', 'Mornings', 'Grooves'))}"
    if kind == 5:
        return f"{w.pick(('Best of', 'This Is', 'Songs by'))} {artist(w)}"
    return title(w)


def street(w: Writer) -> str:
    makers: tuple[Slot, ...] = (surname, _village, _compound)
    return f"{w.pick(makers)(w)} {w.slot('street_kind')}"


def address(w: Writer) -> str:
    return f"{w.between(1, 240)} {street(w)}"


def code(w: Writer) -> str:
    """An order number, a booking reference, a serial number."""
    kind = w.between(0, 7)
    if kind == 0:
        return "".join([w.pick(_ALPHANUMERIC) for _ in range(w.between(5, 8))])
    if kind == 1:
        return "".join([w.pick(_LETTERS) for _ in range(w.between(1, 3))]) + "-" + str(w.between(100, 99999))
    if kind == 2:
        return str(w.between(1000, 99999999))
    if kind == 3:
        return "".join([w.pick(_HEX) for _ in range(w.between(6, 10))])
    if kind == 4:
        return f"{w.pick(('INV', 'ORD', 'TKT', 'REF', 'CASE', 'BK', 'PO', 'ID'))}-{w.between(1000, 999999)}"
    if kind == 5:
        return f"{w.between(10, 99)}-{w.between(10, 99)}-{w.between(10, 99)}"
    if kind == 6:
        return f"{syllables(w, 1, 2)}_{w.between(1, 99)}"
    return f"{w.pick(_LETTERS)}{w.between(10, 999)}{w.pick(_LETTERS)}"


def email(w: Writer) -> str:
    left = w.pick((given, surname, invented))(w).lower().replace(" ", "")
    if w.chance(0.6):
        left += w.pick((".", "_", "")) + surname(w).lower().replace(" ", "")
    if w.chance(0.3):
        left += str(w.between(1, 99))
    return f"{left}@{syllables(w, 1, 2)}.{w.pick(_TLDS)}"


def phone(w: Writer) -> str:
    digits = "".join([w.pick(_DIGITS) for _ in range(10)])
    return w.pick(
        (
            f"0{digits[:3]} {digits[3:6]} {digits[6:]}",
            f"+{w.between(1, 98)} {digits[:3]} {digits[3:]}",
            f"({digits[:3]}) {digits[3:6]}-{digits[6:]}",
            f"{digits[:3]}-{digits[3:6]}-{digits[6:]}",
        )
    )


def handle(w: Writer) -> str:
    kind = w.between(0, 3)
    if kind == 0:
        return "@" + syllables(w, 1, 3)
    if kind == 1:
        return f"@{given(w).lower()}{w.between(1, 999)}"
    if kind == 2:
        return f"@{given(w)}{surname(w)}"
    return f"@{w.slot('title_adjective').lower()}_{w.slot('animal')}"


def hashtag(w: Writer) -> str:
    kind = w.between(0, 2)
    if kind == 0:
        return "#" + syllables(w, 1, 3)
    if kind == 1:
        return f"#{_compound(w).lower()}"
    return f"#{w.slot('weekday')}{w.slot('title_noun')}"


def username(w: Writer) -> str:
    return handle(w)[1:]


def url(w: Writer) -> str:
    tail = "".join([w.pick(_HEX) for _ in range(6)])
    return f"http{w.pick(('', 's'))}://{syllables(w, 1, 2)}.{w.pick(_TLDS)}/{w.pick((tail, syllables(w, 1, 2)))}"


def amount(w: Writer) -> str:
    """Money, in many notations."""
    value = w.pick(
        (w.between(1, 20), w.between(1, 100), w.between(1, 1000), w.between(100, 5000), 10 * w.between(1, 50))
    )
    kind = w.random()
    if kind < 0.4:
        return f"{w.pick('£$€£$')}{value}"
    if kind < 0.6:
        return f"{w.pick('£$€')}{value}.{w.between(0, 99):02d}"
    if kind < 0.85:
        return f"{value} {w.slot('currency')}"
    return f"{value} {w.slot('currency_code')}"


def price(w: Writer) -> str:
    return f"{w.between(0, 300)}.{w.pick(('99', '50', '00', '95', f'{w.between(0, 99):02d}'))}"


def number(w: Writer) -> str:
    return str(w.pick((w.between(0, 10), w.between(0, 100), w.between(0, 1000), w.between(0, 100000))))


def _ordinal(day: int) -> str:
    return f"{day}{'th' if 10 < day < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def date(w: Writer) -> str:
    day, month, year = w.between(1, 28), w.between(1, 12), w.between(1950, 2045)
    name = w.slot("month")
    kind = w.between(0, 6)
    if kind == 0:
        return f"{year}-{month:02d}-{day:02d}"
    if kind == 1:
        return f"{day} {name} {year}"
    if kind == 2:
        return f"{name} {day}, {year}"
    if kind == 3:
        return f"{day:02d}/{month:02d}/{year}"
    if kind == 4:
        return f"{name} {_ordinal(day)}"
    if kind == 5:
        return f"the {_ordinal(day)} of {name}"
    return f"{name[:3]} {day}"


def iso_date(w: Writer) -> str:
    return f"{w.between(1980, 2035)}-{w.between(1, 12):02d}-{w.between(1, 28):02d}"


def clock(w: Writer) -> str:
    hour, minute = w.between(1, 12), w.pick((0, 0, 15, 30, 45, w.between(1, 59)))
    kind = w.between(0, 4)
    if kind == 0:
        return f"{w.between(0, 23):02d}:{minute:02d}"
    if kind == 1:
        return f"{hour} {w.pick(('am', 'pm'))}" if minute == 0 else f"{hour}:{minute:02d} {w.pick(('am', 'pm'))}"
    if kind == 2:
        return f"{hour}{w.pick(('am', 'pm'))}"
    if kind == 3:
        return f"{hour} o'clock"
    return w.pick(("noon", "midnight", f"half past {w.slot('few')}", f"quarter to {w.slot('few')}"))


def _count(w: Writer) -> str:
    return w.pick((w.slot("small"), w.slot("few"), "a couple of", "a few"))


def when(w: Writer) -> str:
    """A time expression as in a request: "next Tuesday", "in 3 hours", "on 4 May"."""
    kind = w.between(0, 9)
    if kind == 0:
        return w.pick(
            (
                "today",
                "tomorrow",
                "tonight",
                "this evening",
                "this afternoon",
                "tomorrow morning",
                "this weekend",
                "now",
                "right now",
                "next week",
                "later today",
            )
        )
    if kind == 1:
        return f"{w.pick(('next', 'this', 'on', 'on'))} {w.slot('weekday')}"
    if kind == 2:
        return f"in {_count(w)} {w.pick(('hours', 'days', 'weeks', 'minutes', 'months', 'years'))}"
    if kind in (3, 4):
        return f"{w.pick(('on', 'for'))} {date(w)}"
    if kind == 5:
        return f"at {clock(w)}"
    if kind == 6:
        return f"{w.slot('weekday')} at {clock(w)}"
    if kind == 7:
        return f"{w.pick(('tomorrow', 'today', 'tonight'))} at {clock(w)}"
    if kind == 8:
        return f"on {w.slot('weekday')} {w.pick(('morning', 'evening', 'afternoon', 'night'))}"
    return w.pick(
        (
            f"{w.slot('small')} {w.pick(('hours', 'days', 'weeks'))} from now",
            f"by {w.slot('weekday')}",
            f"before {clock(w)}",
            f"in {w.slot('month')}",
        )
    )


def ago(w: Writer) -> str:
    return w.pick(
        (
            f"{_count(w)} {w.pick(('days', 'hours', 'weeks', 'months', 'minutes'))} ago",
            "yesterday",
            "this morning",
            "last night",
            "last week",
            f"last {w.slot('weekday')}",
            f"on {w.slot('weekday')}",
            "just now",
            "earlier today",
            f"on {date(w)}",
        )
    )


def duration(w: Writer) -> str:
    return f"{_count(w)} {w.pick(('days', 'hours', 'weeks', 'working days', 'months', 'minutes'))}"


def place(w: Writer) -> str:
    """A town, or a town with its state or country."""
    kind = w.random()
    if kind < 0.6:
        return town(w)
    if kind < 0.75:
        return f"{town(w)}, {w.slot('us_state')}"
    if kind < 0.9:
        return w.slot("country")
    kind_of_place = w.pick(("National Park", "State Park", "Island", "Beach", "Valley", "Forest", "Bay"))
    return f"{w.slot('place_head')}{w.slot('place_tail')} {kind_of_place}"


def team(w: Writer) -> str:
    return f"{town(w)} {w.slot('team_noun')}"


SLOTS: dict[str, Slot] = {
    "word": lambda w: syllables(w, 1, 3),
    "invented": invented,
    "surname": surname,
    "given": given,
    "person": person,
    "town": town,
    "company": company,
    "restaurant": restaurant,
    "title": title,
    "artist": artist,
    "playlist": playlist,
    "street": street,
    "address": address,
    "code": code,
    "email": email,
    "phone": phone,
    "handle": handle,
    "hashtag": hashtag,
    "username": username,
    "url": url,
    "amount": amount,
    "price": price,
    "number": number,
    "date": date,
    "iso_date": iso_date,
    "clock": clock,
    "when": when,
    "ago": ago,
    "duration": duration,
    "place": place,
    "team": team,
    "last4": lambda w: f"{w.between(0, 9999):04d}",
    "year": lambda w: str(w.between(1950, 2025)),
    "percent": lambda w: f"{w.between(1, 99)}%",
}
