"""Templates of opinions by subject and polarity, and of everyday notes."""

from __future__ import annotations

SUBJECTS = ("food", "product", "film", "hotel", "service", "app", "music", "book")

POSITIVE: dict[str, list[str]] = {
    "any": ["I (love|loved|adore) it", "(highly|really|definitely) recommended", "worth every (penny|cent|minute)", "[I am ](very|so|really) (happy|pleased|satisfied) with (it|this)", "five stars", "best (I have had|I've tried|thing) in years", "(exceeded|better than) (all )my expectations", "(would|will) (buy|come|go|try it) again", "(absolutely|simply|just) (perfect|wonderful|fantastic|brilliant|superb)", "could not be happier", "what a (lovely|great|pleasant) surprise", "my {relation} loves it too"],
    "food": ["the {dish} (was|were) (delicious|fresh|tasty|excellent|superb|wonderful)", "great {dish} and (friendly|attentive|helpful) staff", "{restaurant} (is|was) a (gem|delight|lovely place)", "(generous|big) portions at (fair|low) prices", "the best {dish} in {town}", "we had a lovely (evening|dinner|lunch) at {restaurant}", "cosy (place|room|atmosphere) and (quick|great|charming) service"],
    "product": ["the {product} (works|is working) (perfectly|like a charm|great|as promised)", "(great|excellent|solid|good) quality {product} (for the price|from {company})", "my {product} arrived (early|quickly|on time|well packed)", "easy to (use|clean|set up) and looks (great|beautiful)", "after {duration} the {product} is {still} like new", "the {colour} {product} is (gorgeous|beautiful|sturdy)"],
    "film": ["{title} is (a masterpiece|brilliant|hilarious|moving|gripping)", "{person} (is|was) (outstanding|superb|great) in {title}", "I (laughed|cried) (all the way through|the whole time)", "a (clever|touching|thrilling) story with a (great|perfect) ending", "the (acting|music|photography) (is|was) (stunning|wonderful|first class)"],
    "hotel": ["(clean|quiet|lovely|spacious) rooms and (friendly|helpful) staff", "the {company} is (close to everything|beautiful|a great place to stay)", "breakfast was (excellent|great|rich)", "the view over {place} was (amazing|stunning|breathtaking)", "(comfortable|soft) beds and (a warm welcome|good showers)"],
    "service": ["{given} (solved|fixed) my problem (in minutes|right away|quickly)", "(quick|friendly|polite|competent) (help|support|service)", "they (answered|refunded me|replaced it) (at once|within a day)", "{company} (really cares|knows how to treat customers|is great)"],
    "app": ["the app is (fast|easy to use|clear|well designed)", "the new update (fixed everything|is great|made it faster)", "(never crashes|works offline|saves me hours)", "(simple|intuitive|handy) and (free|reliable)"],
    "music": ["{title} by {artist} is (a great|an amazing|a beautiful) (song|album|record)", "I can't stop (listening to|playing) {title}", "{artist} (has|have) (a wonderful voice|done it again|never sounded better)", "the (concert|show) in {town} was (magic|unforgettable|fantastic)"],
    "book": ["I (couldn't put it down|read it in one night|didn't want it to end)", "{title} by {person} is (a wonderful|a gripping|a beautiful|an inspiring) {book_kind}", "the characters (feel real|are lovable|stay with you)", "(beautifully|cleverly|superbly) written"],
}  # fmt: skip

NEGATIVE: dict[str, list[str]] = {
    "any": ["I (hate|hated|regret buying) it", "(do not|don't) (buy|bother|waste your money)", "a [complete|total] waste of (time|money)", "[I am ](very|so|really) (disappointed|unhappy|annoyed|frustrated)", "one star[ is too much]", "worst (I have had|I've tried|thing) in years", "(not|hardly) worth (the price|it|a penny)", "never again", "(absolutely|simply|just) (terrible|awful|horrible|dreadful|useless)", "I want my money back", "what a (let-down|mess|disaster|shame)", "my {relation} hated it too"],
    "food": ["the {dish} (was|were) (cold|stale|burnt|tasteless|disgusting|overcooked|greasy)", "(rude|slow|unfriendly) staff and (bland|bad) {dish}", "{restaurant} (is|was) (dirty|overpriced|a disappointment)", "(tiny|small) portions at (silly|high) prices", "the worst {dish} in {town}", "we waited (an hour|{duration}) for (our food|the bill|a table)", "I (got sick|felt ill) after the {dish}"],
    "product": ["the {product} (broke|stopped working|fell apart) after {duration}", "(poor|cheap|bad|terrible) quality {product} [from {company}]", "my {product} arrived (late|broken|damaged|in the wrong colour)", "(hard|impossible) to (use|clean|set up) and looks (cheap|ugly)", "the {product} is nothing like the (picture|description)", "the {colour} {product} (smells|is flimsy|scratches easily)"],
    "film": ["{title} is (boring|a mess|far too long|predictable)", "{person} (is|was) (wooden|terrible|miscast) in {title}", "I (fell asleep|walked out|looked at my watch) (after an hour|half way through)", "a (silly|weak|dull) story with a (bad|stupid) ending", "the (acting|dialogue|plot) (is|was) (awful|laughable|a joke)"],
    "hotel": ["(dirty|noisy|tiny|smelly) rooms and (rude|careless) staff", "the {company} is (run down|overpriced|far from everything)", "breakfast was (cold|poor|a joke)", "the (shower|heating|wifi) (did not work|was broken) [for {duration}]", "we could not sleep because of the (noise|heat|smell)"],
    "service": ["nobody (answered|helped me|called back)", "(slow|rude|useless|hopeless) (help|support|service)", "they (ignored me|lost my order|refused a refund|kept me waiting for {duration})", "{company} (doesn't care|only wants your money|lied to me)"],
    "app": ["the app (crashes|freezes|logs me out) (all the time|every day)", "the new update (ruined everything|broke it|made it slower)", "(full of ads|drains the battery|never loads)", "(confusing|ugly|slow) and (buggy|unreliable)"],
    "music": ["{title} by {artist} is (a dull|an awful|a boring) (song|album|record)", "I (skipped|switched off) {title} after a minute", "{artist} (cannot sing|sounded tired|should stop)", "the (concert|show) in {town} was (too loud|far too short|a rip-off)"],
    "book": ["I (gave up|stopped reading|got bored) after {few} chapters", "{title} by {person} is (a tedious|a confusing|a pointless) {book_kind}", "the characters (are flat|are annoying|made no sense)", "(badly|poorly|clumsily) written"],
}  # fmt: skip

NEUTRAL: dict[str, list[str]] = {
    "any": ["it is (okay|all right|average|fine|nothing special)", "(neither|not) (good nor bad|great but not terrible)", "(does|did) (the job|what it should), no more", "some (good|nice) parts and some bad ones", "I have no strong opinion", "three stars"],
    "food": ["the {dish} was (fine|average|okay)", "we had {dish} at {restaurant} on {weekday}"],
    "product": ["the {product} is (okay for the price|average|as described)", "I bought the {product} {ago}"],
    "film": ["{title} was (watchable|fine for one evening|average)", "I saw {title} on {weekday}"],
    "hotel": ["the room was (okay|plain|as expected)", "we stayed {few} nights at the {company}"],
    "service": ["the answer came after {duration}", "they (replied|called) on {weekday}"],
    "app": ["the app does what it says", "I use the app on my {gadget}"],
    "music": ["{title} is (an okay song|fine in the background)", "{artist} played {few} songs"],
    "book": ["{title} is (readable|an average {book_kind})", "I read {title} in {month}"],
}  # fmt: skip

NOTES = [
    "I (met|saw|called) {person} {ago}",
    "we (went|drove|took the {vehicle}) to {place} {ago}",
    "(it was|the weather was|it got) {weather_adjective} [again] (all day|in the morning|in the evening)",
    "for (lunch|dinner|breakfast) (I|we) had {dish} and {drink}",
    "my {relation} (bought|lost|sold|broke) (a|the) {product}",
    "NAME (works|is working) (as a {job}|at {company})",
    "NAME (feels|felt|is|was) {emotion} (today|because of the {weather_noun}|about {weekday})",
    "(don't forget|remember) the (meeting|appointment|dinner) with {person} {when}",
    "the {vehicle} from {town} (was late|was cancelled|was full)",
    "(I|we) (watched|saw) {title}[ and (liked|loved|hated) it]",
    "(listening to|I keep playing) {title} by {artist}",
    "the {device} in the {room} (is broken|works again|makes a strange noise)",
    "{company} (opened|closed|is opening) a {shop_kind} in the {area}",
    "(I|we) (paid|spent) {amount} (for|on) (a {product}|{dish})",
    "our {animal} is called {given} and likes {dish}",
    "{given} (has|got) {illness} and (stays|stayed) (at home|in bed) until {weekday}",
    "the {subject} (exam|homework|lesson) is {when}",
    "I (want|plan|hope) to (learn {language}|play the {instrument}|start {hobby}) [this year]",
    "{team} play {team} {when}",
    "we (are moving|moved) to {address} in {town}",
    "please (bring|buy) {ingredient} and {ingredient} (on the way home|for {weekday})",
    "my (new|old) {garment} is {colour}[, just like the {furniture}]",
    "NAME will be (late|there at {clock}|in {town}) {when}",
]
