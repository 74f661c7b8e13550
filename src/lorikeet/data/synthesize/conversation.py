"""Documents about topics: help pages, dialogues, paraphrase sets, lists of questions with their topics."""

from __future__ import annotations

from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.layouts import ASSISTANT, END, USER, Task, informal, render
from lorikeet.data.synthesize.lexicon import Topic, topics


def ask(w: Writer, topic: Topic) -> str:
    text = w.say(w.pick(topic.asks))
    if w.chance(0.08):
        text = w.say("{hello}[,]") + " " + text
    if w.chance(0.06):
        text += w.pick((". ", ", ")) + w.slot("thanks") if text[-1:] != "?" else " " + w.slot("thanks")
    return informal(w, text.strip())


def answer(w: Writer, topic: Topic) -> str:
    opening = w.say(w.pick(_OPENINGS)) if w.chance(0.5) else ""
    body = " ".join(w.sentence(text) for text in w.sample(topic.answers, w.between(1, 2)))
    closing = w.say(w.pick(_CLOSINGS)) if w.chance(0.3) else ""
    return " ".join(part for part in (opening, body, closing) if part)


def gist(w: Writer, topic: Topic) -> str:
    return w.say(w.pick(topic.gists))


def label(w: Writer, topic: Topic, style: int) -> str:
    """The title as a label: plain, snake_case, CamelCase, kebab-case or capitals."""
    words = topic.titles[0 if style < 8 else w.between(0, len(topic.titles) - 1)].lower()
    style %= 8
    if style <= 2:
        return words
    if style <= 4:
        return words.replace("-", " ").replace(" ", "_")
    if style == 5:
        return "".join(part.capitalize() for part in words.replace("-", " ").split())
    if style == 6:
        return words.replace(" ", "-")
    return words.replace("-", " ").replace(" ", "_").upper()


_OPENINGS = (
    "[I'm ]sorry (to hear that|about that|for the trouble|for the wait).",
    "(Thanks|Thank you) for (getting in touch|your message|letting us know|writing to us|asking).",
    "(Sure|Of course|No problem|Certainly|Happy to help).",
    "(I understand|I see|Got it).",
    "(Hi|Hello) {given}[, thanks for writing].",
    "Good question.",
)
_CLOSINGS = (
    "(Is there|Can I help with) anything else?",
    "Let (me|us) know if (that helps|you need anything else|it still does not work).",
    "(Have a nice day|All the best|Kind regards)[, {given}].",
    "(You can|Please) (reply here|call us on {phone}|write to {email}) if (it happens again|you have more questions).",
)
_PARAPHRASE_LINKS = (
    "Another way to say this: ",
    "In other words: ",
    "Or: ",
    "Same question: ",
    "This means the same as: ",
    "Put differently: ",
    "Somebody else wrote: ",
    "Also: ",
    "Similar: ",
)


def _related(w: Writer, topic: Topic) -> Topic:
    """Another topic, more often of the same domain, so that telling them apart takes care."""
    for _ in range(4):
        other = w.pick(topics())
        if other is not topic and (other.domain == topic.domain or w.chance(0.3)):
            return other
    return w.pick([other for other in topics()[:8] if other is not topic])


_SENDERS = ("Customer", "Message", "Text", "Question", "Query", "User", "Utterance", "Input")


def paraphrases(w: Writer) -> str:
    return w.pick((_ways_to_say, _ways_to_say, _same_or_different, _odd_one_out, _summaries, _rewrites))(w)


def _ways_to_say(w: Writer) -> str:
    topic = w.pick(topics())
    lines = [ask(w, topic)] + [w.pick(_PARAPHRASE_LINKS) + ask(w, topic) for _ in range(w.between(1, 4))]
    if w.chance(0.5):
        lines.append(
            w.pick(("In short: ", "Topic: ", "Gist: ", "This is about: ", "Summary: "))
            + w.pick((gist(w, topic), topic.titles[0]))
        )
    if w.chance(0.4):
        other = _related(w, topic)
        lines.append(
            w.pick(("Different question: ", "Not the same: ", "Something else: ", "A different matter: "))
            + ask(w, other)
        )
        if w.chance(0.5):
            lines.append(w.pick(("That is about: ", "Topic: ", "In short: ")) + gist(w, other))
    return w.pick(("\n", "\n", " ")).join(lines)


def _same_or_different(w: Writer) -> str:
    yes, no = w.pick(
        (("yes", "no"), ("same", "different"), ("Yes", "No"), ("true", "false"), ("paraphrase", "not a paraphrase"))
    )
    pairs = []
    for _ in range(w.between(1, 4)):
        topic = w.pick(topics())
        same = w.chance(0.5)
        first, second = ask(w, topic), ask(w, topic if same else _related(w, topic))
        pairs.append(
            (
                w.pick((f"{first} / {second}", f'"{first}" and "{second}"', f"A: {first}\nB: {second}")),
                yes if same else no,
            )
        )
    return render(
        w,
        Task(
            (
                "Do (both|these|the two) (sentences|messages|questions) mean the same?",
                "(Same meaning|Paraphrase) or not?",
                "Decide whether the (two|customers) ask (about )the same thing.",
            ),
            pairs,
            ("Pair", "Sentences", "Input", "Questions"),
            ("Same", "Answer", "Output", "Equivalent"),
        ),
    )


def _odd_one_out(w: Writer) -> str:
    topic = w.pick(topics())
    other = _related(w, topic)
    odd = ask(w, other)
    lines = w.shuffled([ask(w, topic) for _ in range(w.between(2, 4))] + [odd])
    listed = "\n".join(f"{index}. {line}" for index, line in enumerate(lines, 1))
    place = lines.index(odd) + 1
    name = w.pick(("Odd one out", "The one that does not belong", "Different from the others"))
    solution = w.pick((str(place), f"number {place}", odd))
    return f"{listed}\n{name}: {solution}\nThe others are about {w.pick((topic.titles[0], gist(w, topic)))}."


def _summaries(w: Writer) -> str:
    chosen = w.sample(topics(), w.between(1, 4))
    return render(
        w,
        Task(
            (
                "(Summarise|Sum up|Shorten) (the message|this|what the customer says)[ in a few words].",
                "What is this about?",
                "What does the (customer|person|writer) want?",
                "Give the gist.",
            ),
            [(ask(w, topic), gist(w, topic)) for topic in chosen],
            ("Message", "Text", "Customer", "Question", "Post", "Ticket"),
            ("Summary", "Gist", "In short", "About", "Meaning"),
        ),
    )


def _rewrites(w: Writer) -> str:
    chosen = w.sample(topics(), w.between(1, 3))
    return render(
        w,
        Task(
            (
                "(Rewrite|Rephrase|Paraphrase) (this|the sentence|the message)[ in other words].",
                "Say (it|the same) (differently|in another way).",
                "Find another way to ask this.",
            ),
            [(ask(w, topic), ask(w, topic)) for topic in chosen],
            ("Original", "Sentence", "Message", "Input"),
            ("Paraphrase", "Rewritten", "Other words", "Output"),
        ),
    )


def intents(w: Writer) -> str:
    return w.pick((_labelled, _labelled, _labelled, _arbitrary, _arbitrary, _closest, _looked_up))(w)


def _neighbours(w: Writer, count: int) -> list[Topic]:
    """``count`` different topics, most of them of one domain."""
    first = w.pick(topics())
    chosen = {first.titles[0]: first}
    for _ in range(count * 3):
        if len(chosen) < count:
            other = _related(w, first)
            chosen[other.titles[0]] = other
    return list(chosen.values())


def _labelled(w: Writer) -> str:
    """Messages with the topic they belong to, with or without the list of topics to choose from."""
    chosen = _neighbours(w, w.between(2, 7))
    style = w.between(0, 15)
    names = {topic.titles[0]: label(w, topic, style) for topic in chosen}
    rows = [w.pick(chosen) for _ in range(w.between(1, 7))] if w.chance(0.5) else chosen
    examples = [(ask(w, topic), names[topic.titles[0]]) for topic in rows]
    name = w.pick(("topic", "intent", "category", "label", "subject", "department", "class", "tag"))
    options = w.pick((", ", " | ", "; ", "\n- ")).join(w.shuffled(list(names.values())))
    instructions = [
        f"(Classify|Label|Sort|Tag) the (message|question|text) by {name}.",
        f"What is the {name}?",
        f"Which {name} fits (best|the message)?",
        f"Choose the {name}.",
    ]
    page = render(w, Task(instructions, examples, _SENDERS, (name.capitalize(), name, name.capitalize())))
    if w.chance(0.4):
        plural = {"category": "categories", "class": "classes"}.get(name, name + "s")
        head = w.pick((f"Possible {plural}: ", f"{plural.capitalize()}: ", f"Options for {name}: "))
        return f"{USER}{head}{options}\n{page[len(USER) :]}" if page.startswith(USER) else f"{head}{options}\n\n{page}"
    return page


def _arbitrary(w: Writer) -> str:
    """Labels that mean nothing: only the earlier examples of the same topic tell which label is right."""
    chosen = _neighbours(w, w.between(2, 4))
    slot = w.pick(("word", "invented", "code", "colour", "animal", "given"))
    marks = w.pick((w.several(slot, len(chosen)), list("ABCD"), ["1", "2", "3", "4"]))
    order = w.shuffled(list(range(len(chosen)))) + [w.between(0, len(chosen) - 1) for _ in range(w.between(3, 8))]
    examples = [(ask(w, chosen[at]), marks[at]) for at in order]
    return render(
        w,
        Task(
            ("Continue (the list|in the same way).", "(Sort|Label) the messages."),
            examples,
            _SENDERS,
            ("Group", "Label", "Mark"),
        ),
    )


def _closest(w: Writer) -> str:
    """Which of several questions means the same as the first."""
    chosen = _neighbours(w, w.between(2, 5))
    wanted = w.pick(chosen)
    options = [ask(w, topic) for topic in chosen]
    right = options[chosen.index(wanted)]
    marks = w.pick(("1234567", "ABCDEFG", "abcdefg"))
    tail = w.pick((". ", ") ", ": "))
    listed = "\n".join([f"{mark}{tail}{option}" for mark, option in zip(marks, options, strict=False)])
    mark = marks[chosen.index(wanted)]
    question = w.say("Which [one] (means the same as|is closest to|is about the same thing as)")
    answer = w.pick((mark, f"{mark}{tail}{right}", right))
    if w.chance(0.4):
        return f"{USER}{listed}\n\n{question}: {ask(w, wanted)}\n{ASSISTANT}{answer}{END}"
    head = w.pick(("Options", "Candidates", "Which of these means the same?"))
    name = w.pick(("Answer", "Best match", "Same meaning", "Closest"))
    return f"{ask(w, wanted)}\n\n{head}:\n{listed}\n{name}: {answer}"


def _looked_up(w: Writer) -> str:
    """A help text with several entries, then a question in other words and the entry that answers it."""
    chosen = _neighbours(w, w.between(2, 5))
    entries = [(topic, w.sentence(w.pick(topic.answers))) for topic in chosen]
    text = "\n".join([f"{w.pick(topic.titles).capitalize()}: {body}" for topic, body in entries])
    asked = w.sample(entries, w.between(1, 2))
    if w.chance(0.5):
        (topic, body), *_ = asked
        return f"{USER}{text}\n\n{ask(w, topic)}\n{ASSISTANT}{body}{END}"
    left, right = w.pick((("Q: ", "A: "), ("Customer: ", "Agent: "), ("Question: ", "Answer: "), ("", "-> ")))
    return f"{text}\n\n" + "\n".join([f"{left}{ask(w, topic)}\n{right}{body}" for topic, body in asked])


def support(w: Writer) -> str:
    return w.pick((_faq, _faq, _dialogue, _dialogue, _chat_dialogue, _ticket, _help_page, _forum))(w)


def _faq(w: Writer) -> str:
    first = w.pick(topics())
    chosen = [first] + [_related(w, first) for _ in range(w.between(0, 3))]
    left, right = w.pick((("Q: ", "A: "), ("Question: ", "Answer: "), ("**", ""), ("## ", ""), ("", ""), ("- ", "  ")))
    tail = "**" if left == "**" else ""
    blocks = [f"{left}{ask(w, topic)}{tail}\n{right}{answer(w, topic)}" for topic in chosen]
    if w.chance(0.3):
        blocks.insert(0, w.say("(FAQ|Help|Frequently asked questions|Questions and answers)[ - {company}]"))
    return w.pick(("\n\n", "\n")).join(blocks)


_FOLLOW_UPS = (
    "how long will that take?",
    "and what does it cost?",
    "I already tried that.",
    "thanks, that worked",
    "can you do it for me?",
    "where do I find that?",
    "ok, I will try",
    "is there another way?",
    "are you sure?",
    "that didn't help",
    "great, thank you so much",
)
_REPLIES = (
    "It takes {duration}.",
    "That is free of charge.",
    "It costs {amount}.",
    "Let me check that for you.",
    "Could you give me your (reference|order) number?",
    "I have passed it on to (the team|my colleague {given}).",
    "You find it under (Settings|Profile|Account|Help).",
    "You're welcome!",
    "I have done that for you.",
    "Please restart (the app|your phone) and try (again|once more).",
)


def _dialogue(w: Writer) -> str:
    topic = w.pick(topics())
    customer, agent = w.pick(
        (
            ("Customer", "Agent"),
            ("User", "Support"),
            ("Client", "Assistant"),
            (w.slot("given"), w.slot("given")),
            ("Caller", "Operator"),
            ("Me", "Them"),
        )
    )
    lines = [f"{customer}: {ask(w, topic)}", f"{agent}: {answer(w, topic)}"]
    if w.chance(0.35):
        reference = w.slot("code")
        lines += [
            f"{agent}: {w.say('(What is|Can I have|Please give me) your (order|reference|case|booking) number?')}",
            f"{customer}: {w.pick(('', 'it is ', 'sure, ', 'yes, ', 'that would be '))}{reference}",
        ]
        lines.append(
            f"{agent}: {w.say('(Thank you, |Great, |)I (found|see|have)')} {reference}. {w.sentence(w.pick(_REPLIES))}"
        )
    for _ in range(w.between(0, 2)):
        lines += [f"{customer}: {w.say(w.pick(_FOLLOW_UPS))}", f"{agent}: {w.sentence(w.pick(_REPLIES))}"]
    return "\n".join(lines)


def _chat_dialogue(w: Writer) -> str:
    topic = w.pick(topics())
    turns = [f"{USER}{ask(w, topic)}\n{ASSISTANT}{answer(w, topic)}{END}"]
    if w.chance(0.5):
        turns.append(f"{USER}{w.say(w.pick(_FOLLOW_UPS))}\n{ASSISTANT}{w.sentence(w.pick(_REPLIES))}{END}")
    return "\n".join(turns)


def _ticket(w: Writer) -> str:
    topic = w.pick(topics())
    name, reference = w.slot("person"), w.slot("code")
    fields = [
        ("Ticket", reference),
        ("From", name),
        ("Subject", w.pick(topic.titles)),
        ("Date", w.slot("date")),
        ("Priority", w.pick(("low", "normal", "high", "urgent"))),
    ]
    head = "\n".join(f"{key}: {value}" for key, value in ([fields[0], *w.sample(fields[1:], w.between(2, 4))]))
    first = name.split()[0]
    reply = f"{w.pick(('Hi', 'Hello', 'Dear'))} {first},\n{answer(w, topic)}"
    return f"{head}\n\n{ask(w, topic)}\n\n{reply}\n{w.say('(Your|The) (ticket|case) number is')} {reference}."


def _help_page(w: Writer) -> str:
    topic = w.pick(topics())
    title = w.pick((w.pick(topic.titles).capitalize(), ask(w, topic)))
    intro = (
        w.say("(This page is for you if|Read on if|Many people write to us that|A common case is that)")
        + " "
        + gist(w, topic)
        + "."
    )
    asks = "\n".join(f"{w.pick(('-', '*'))} {ask(w, topic)}" for _ in range(w.between(2, 4)))
    heading = w.pick(("People also ask", "Typical questions", "What customers say"))
    advice = " ".join(w.sentence(text) for text in w.shuffled(topic.answers))
    return f"# {title}\n\n{intro}\n\n{heading}:\n{asks}\n\n{advice}"


def _forum(w: Writer) -> str:
    topic = w.pick(topics())
    one, two, three = w.slot("username"), w.slot("username"), w.slot("username")
    lines = [
        f"{one}: {ask(w, topic)}",
        f"{two}: {w.sentence(w.pick(topic.answers))}",
        f"{three}: {w.say('(same here|I had the same problem|me too|same issue)')}, {ask(w, topic)}",
    ]
    if w.chance(0.5):
        lines.append(
            f"{one}: @{two} {w.pick(('thanks, that helped', 'tried it, no luck', 'ok will do', 'where exactly?'))}"
        )
    return "\n".join(lines)
