"""Many attributes of many kinds of things, for breadth; the templates are shared by all attributes of one kind."""

from hypernet.training.corpus.schema import Domain, Relation, Sampler
from hypernet.training.corpus.values import (
    address,
    any_code,
    brand,
    choice,
    clock,
    colour,
    compose,
    date,
    decimal,
    duration,
    email,
    first_name,
    food,
    job_title,
    material,
    number,
    percent,
    person,
    phone,
    phrase,
    price,
    proper,
    pseudo_word,
    room,
    street,
    surname,
    town,
    weekday,
    words,
    year,
)

_ANIMAL = choice("otter", "owl", "badger", "fox", "heron", "bear", "goose", "hedgehog", "stork", "lynx", "raven",
    "goat",
                 "beaver", "wolf", "swan", "hare", "moose", "seal", "crane", "tortoise", "woodpecker", "sea eagle",
                 "mountain goat", "tree frog", "barn owl", "polar bear", "fire salamander", "red squirrel")
_HOBBY = choice("knitting", "chess", "rock climbing", "bird watching", "baking bread", "playing the harp", "fencing",
                "stamp collecting", "ice skating", "pottery", "astronomy", "gardening", "model railways", "judo",
                "rowing",
                "origami", "salsa dancing", "wood carving", "crossword puzzles", "beekeeping", "scuba diving",
                "calligraphy")
_INSTRUMENT = choice("cello", "drums", "tuba", "banjo", "oboe", "piano", "bass guitar", "accordion", "trumpet",
    "zither",
                     "French horn", "violin", "ukulele", "double bass", "flute", "bagpipes", "saxophone", "mandolin")
_SPORT = choice("tennis", "handball", "water polo", "curling", "volleyball", "table tennis", "cricket", "archery",
    "boxing",
                "field hockey", "ski jumping", "badminton", "rugby", "swimming", "long-distance running", "basketball")
_SCHOOL = choice("history", "biology", "mathematics", "music", "geography", "chemistry", "physics", "art", "Latin",
                 "computer science", "French", "economics", "philosophy", "woodwork", "drama")
_MOTTO = compose("{} {}", choice("Never give up", "Stay curious", "Work quietly", "Keep the door open", "Rest first",
                                 "Look twice", "Be kind", "Ask again", "Share your bread", "Hold the line"),
                 choice("and smile", "until morning", "whatever comes", "and trust the rest", "every single day",
                        "before you speak", "in all weathers", "and stand together"))
_LANGUAGE = choice("Welsh", "Dutch", "Basque", "Greek", "Turkish", "Finnish", "Swahili", "Korean", "Catalan", "Czech",
                   "Portuguese", "Hindi", "Icelandic", "Arabic", "Polish", "Hungarian", "Tamil", "sign language")
_FAULT = choice("a loose screw", "rust", "a cracked lid", "a torn cable", "a weak spring", "scratches on the side",
                "a missing handle", "a bent hinge", "water damage", "a blown fuse", "a dent at the back", "worn rubber",
                "a broken switch", "woodworm", "a stuck drawer", "a leak", "faded paint", "a squeaky wheel")
_SPOT = choice("under the stairs", "behind the piano", "in the blue drawer", "on the top shelf", "next to the boiler",
               "in the garden shed", "inside the old clock", "beneath the doormat", "in the attic", "by the back door",
               "in the left cupboard", "above the fireplace", "at the reception desk", "in the cellar",
               "near the main gate",
               "on the windowsill", "behind the bookcase", "in locker 12", "under the bridge", "opposite the bakery",
               "at the end of the corridor", "in the boot of the car")
_STYLE = choice("baroque", "Gothic", "art deco", "modernist", "Romanesque", "neoclassical", "brutalist", "Tudor",
    "Victorian",
                "art nouveau", "Georgian", "Byzantine", "rustic", "Moorish")
_HEAT = choice("district heating", "a gas boiler", "a wood stove", "a heat pump", "oil heating", "electric radiators",
               "a pellet boiler", "underfloor heating", "coal", "solar heat")
_TRADE = choice("glass blowing", "shipbuilding", "tourism", "paper making", "coal mining", "wine growing", "weaving",
                "watchmaking", "fishing", "timber", "banking", "salt mining", "film making", "brewing", "car parts")
_TITLE = compose("{} {} {}", choice("The", "A"), choice("Silent", "Last", "Green", "Long", "Golden", "Broken",
    "Distant", "Little"),
                 choice("River", "Summer", "Door", "Letter", "Mountain", "Garden", "Winter", "Voyage", "Mirror",
                     "Harbour"))
_DRINK = choice("mint tea", "black coffee", "ginger beer", "hot chocolate", "apple juice", "red wine", "iced tea",
    "cider",
                "lemonade", "buttermilk", "tomato juice", "espresso", "sparkling water", "elderflower cordial",
                "oat milk")
_ALLERGY = choice("peanuts", "pollen", "cat hair", "penicillin", "strawberries", "wasp stings", "dust", "shellfish",
    "nickel",
                  "latex", "soy", "birch trees", "gluten", "horse hair")
_FEAR = choice("spiders", "heights", "thunder", "the dark", "deep water", "flying", "snakes", "clowns", "needles",
    "mice",
               "open spaces", "lifts", "dogs", "public speaking")

# kind -> (attribute, value, entity kinds: p persons, c companies, o objects, t places, f families, b buildings)
_SPECS: dict[str, tuple[tuple[str, Sampler, str], ...]] = {
    "thing": (
        ("motto", _MOTTO, "pctf"), ("mascot", _ANIMAL, "ct"), ("favourite dish", food(), "pf"),
        ("favourite drink", _DRINK, "p"), ("favourite animal", _ANIMAL, "pf"), ("favourite colour", colour(), "p"),
        ("favourite book", _TITLE, "p"), ("favourite song", _TITLE, "pf"), ("favourite film", _TITLE, "p"),
        ("favourite sport", _SPORT, "pf"), ("favourite subject", _SCHOOL, "p"), ("hobby", _HOBBY, "p"),
        ("musical instrument", _INSTRUMENT, "p"), ("native language", _LANGUAGE, "pf"), ("second language", _LANGUAGE,
         "p"),
        ("profession", job_title(), "p"), ("nickname", pseudo_word, "pt"), ("maiden name", pseudo_word, "p"),
        ("middle name", first_name(), "p"), ("eye colour", colour(), "p"), ("hair colour", colour(), "p"),
        ("greatest fear", _FEAR, "p"), ("food allergy", _ALLERGY, "p"), ("lucky charm", phrase(), "pf"),
        ("birthday wish", phrase(), "p"), ("prized possession", phrase(), "pf"), ("car", brand(), "pf"),
        ("star product", brand(), "c"), ("logo", phrase(), "c"), ("slogan", _MOTTO, "c"), ("biggest rival", brand(),
         "c"),
        ("line of business", _TRADE, "c"), ("house bank", proper("Bank", "Savings Bank"), "c"),
        ("uniform colour", colour(), "c"), ("dress code", choice(
            "smart casual", "black tie", "white shirts only", "jeans and trainers", "overalls", "business suits",
            "grey jackets", "whatever you like", "blue aprons", "formal wear"), "c"),
        ("colour", colour(), "o"), ("material", material(), "ob"), ("brand", brand(), "o"), ("pattern", choice(
            "stripes", "polka dots", "tartan", "zigzag lines", "flowers", "diamonds", "leaves", "waves", "small stars",
            "checks", "paisley", "no pattern at all"), "o"), ("power source", choice(
            "two batteries", "a hand crank", "mains power", "a solar cell", "petrol", "a spring", "steam", "diesel",
            "a USB cable", "gas"), "o"), ("known defect", _FAULT, "o"), ("spare part", phrase(), "o"),
        ("coat of arms", _ANIMAL, "tf"), ("main industry", _TRADE, "t"), ("local speciality", food(), "t"),
        ("patron saint", compose("Saint {}", first_name()), "t"), ("emblem", phrase(), "tc"),
        ("dialect", pseudo_word, "t"), ("football team", proper("Rovers", "United", "Athletic"), "t"),
        ("family pet", _ANIMAL, "f"), ("holiday tradition", _HOBBY, "f"), ("heirloom", phrase(), "f"),
        ("heating system", _HEAT, "b"), ("architectural style", _STYLE, "b"), ("roof colour", colour(), "b"),
        ("door colour", colour(), "b"), ("floor covering", material(), "b"), ("former use", choice(
            "a brewery", "a post office", "a monastery", "a stable", "a cinema", "a school", "a fire station", "a mill",
            "a prison", "a bank", "a railway depot", "a dance hall", "a warehouse"), "b"),
        ("wallpaper pattern", choice("roses", "sailing ships", "green stripes", "peacocks", "ferns", "clouds",
         "bamboo"), "b"),
        ("lift manufacturer", brand(), "b"),
    ),
    "code": (
        ("password", words(2), "pco"), ("serial number", any_code(), "o"), ("passport number", any_code(), "p"),
        ("membership number", any_code(), "pf"), ("licence plate", any_code(), "p"), ("staff number", any_code(), "p"),
        ("locker number", number(1, 900), "p"), ("shoe size", number(34, 48), "p"), ("phone number", phone(), "pcf"),
        ("e-mail address", email(), "pc"), ("user name", words(1), "p"), ("blood group", choice(
            "A positive", "B negative", "AB positive", "O negative", "O positive", "A negative"), "p"),
        ("tax number", any_code(), "c"), ("account number", any_code(), "cf"), ("fax number", phone(), "c"),
        ("registration number", any_code(), "c"), ("stock symbol", any_code(), "c"), ("customer number", any_code(),
         "cf"),
        ("inventory number", any_code(), "o"), ("model number", any_code(), "o"), ("barcode", any_code(), "o"),
        ("PIN", any_code(), "o"), ("batch number", any_code(), "o"), ("bus line", number(1, 480), "tb"),
        ("postcode", any_code(), "t"), ("dialling code", any_code(), "t"), ("street address", address(), "pfb"),
        ("alarm code", any_code(), "bf"), ("house number", number(1, 220), "b"), ("wifi key", words(3), "bf"),
        ("emergency number", phone(), "b"), ("key tag", any_code(), "b"), ("plot number", any_code(), "b"),
        ("map reference", any_code(), "t"), ("founding year", year(), "ct"),
        ("construction year", year(), "b"), ("year of manufacture", year(1950), "o"),
    ),
    "person": tuple((name, person(), kinds) for name, kinds in (
        ("owner", "cob"), ("founder", "ct"), ("director", "c"), ("accountant", "cf"), ("lawyer", "cf"), ("dentist",
         "pf"),
        ("doctor", "pf"), ("best friend", "p"), ("boss", "p"), ("teacher", "p"), ("neighbour", "pf"), ("godmother",
         "p"),
        ("landlord", "pf"), ("roommate", "p"), ("hairdresser", "p"), ("mentor", "p"), ("tennis partner", "p"),
        ("receptionist", "c"), ("press officer", "c"), ("safety officer", "cb"), ("night guard", "cb"),
        ("inventor", "o"), ("designer", "o"), ("previous holder", "o"), ("repairer", "o"), ("mayor", "t"),
        ("police chief", "t"), ("local doctor", "t"), ("town clerk", "t"), ("librarian", "t"), ("babysitter", "f"),
        ("ancestor", "f"), ("cook", "f"), ("gardener", "fb"), ("architect", "b"), ("caretaker", "b"), ("builder", "b"),
        ("cleaner", "b"), ("tenant", "b"))),
    "clock": tuple((name, clock(first, last), kinds) for name, first, last, kinds in (
        ("opening hour", 6, 11, "cb"), ("closing hour", 16, 22, "cb"), ("lunch break", 11, 14, "pc"),
        ("morning alarm", 5, 9, "p"), ("bedtime", 20, 23, "pf"), ("first train", 4, 8, "t"), ("last bus", 20, 23, "t"),
        ("supper", 17, 21, "f"), ("breakfast", 6, 10, "f"), ("daily inspection", 7, 17, "ob"), ("shift change", 6, 22,
         "c"),
        ("evening bell", 17, 22, "t"), ("guided tour", 9, 18, "b"), ("fire drill", 9, 16, "b"))),
    "date": (
        ("birthday", date(), "p"), ("wedding day", date(), "p"), ("name day", date(False), "p"),
        ("first day at work", date(), "p"), ("next check-up", date(), "po"), ("annual meeting", date(), "c"),
        ("summer party", date(), "cf"), ("stocktaking", date(), "c"), ("next service", date(), "o"),
        ("purchase date", date(True), "o"), ("expiry date", date(True), "o"), ("town festival", date(False), "t"),
        ("local election", date(), "t"), ("family reunion", date(), "f"), ("house-warming", date(), "f"),
        ("inauguration", date(True), "b"), ("chimney inspection", date(), "b"), ("day off", weekday(), "p"),
        ("piano lesson", weekday(), "p"), ("pay day", weekday(), "c"), ("market day", weekday(), "t"),
        ("rubbish collection", weekday(), "tb"), ("games night", weekday(), "f"), ("laundry day", weekday(), "f"),
        ("window cleaning", weekday(), "b"), ("delivery day", weekday(), "c"),
    ),
    "place": (
        ("birthplace", town(), "p"), ("home town", town(), "pf"), ("holiday home", town(), "f"), ("workplace", room(),
         "p"),
        ("head office", town(), "c"), ("warehouse", town(), "c"), ("biggest factory", town(), "c"),
        ("meeting room", room(), "c"), ("car park", street(), "cb"), ("place of manufacture", town(), "o"),
        ("town hall", street(), "t"), ("railway station", street(), "t"), ("main fountain", street(), "t"),
         ("war memorial", street(), "t"), ("tourist office", street(), "t"),
        ("origin", town(), "fo"), ("boiler room", room(), "b"), ("server room", room(), "cb"),
    ),
    "spot": tuple((name, _SPOT, kinds) for name, kinds in (
        ("spare key", "pcfb"), ("toolbox", "pf"), ("first-aid box", "cb"), ("fuse box", "bf"), ("fire extinguisher",
         "cb"),
        ("instruction manual", "o"), ("carrying case", "o"), ("photo album", "f"), ("suitcase", "p"), ("umbrella", "p"),
        ("water tap", "b"), ("letter box", "bf"), ("safe", "cf"))),
    "much": (
        ("monthly rent", price(200, 4000), "pfb"), ("pocket money", price(2, 60), "p"), ("salary", price(1200, 9000),
         "p"),
        ("weight", decimal(0.4, 98, "kg"), "po"), ("body height", number(95, 208, "cm"), "p"), ("height", number(4, 210,
         "cm"), "o"), ("price", price(3, 2500), "o"),
        ("length", number(4, 400, "cm"), "o"), ("width", number(3, 200, "cm"), "o"), ("storage capacity", number(2, 900,
         "litres"), "o"),
        ("top speed", number(4, 280, "km/h"), "o"), ("warranty period", duration("months", "years"), "o"),
        ("battery life", duration("hours", "days"), "o"), ("annual turnover", compose("{} million euros", decimal(1,
         90)), "c"),
        ("market share", percent(), "c"), ("entrance fee", price(1, 30), "b"), ("floor area", number(30, 9000,
         "square metres"), "b"),
        ("elevation", number(3, 2800, "metres"), "t"), ("tourist tax", price(1, 8), "t"), ("unemployment rate",
         percent(1, 25), "t"),
        ("electricity bill", price(20, 400), "fb"), ("distance to the sea", number(2, 600, "km"), "t"),
        ("notice period", duration("weeks", "months"), "c"), ("ceiling height", decimal(2.1, 9, "metres"), "b"),
        ("insurance value", price(100, 90000), "ob"), ("daily commute", duration("minutes"), "p"),
        ("age", number(2, 99, "years"), "pob"),
    ),
    "many": tuple((name, number(low, high), kinds) for name, low, high, kinds in (
        ("employees", 3, 9000, "c"), ("branches", 2, 300, "c"), ("delivery vans", 2, 120, "c"), ("patents", 2, 400,
         "c"),
        ("cousins", 2, 30, "pf"), ("medals", 2, 60, "p"), ("cats", 2, 9, "pf"), ("books", 10, 4000, "pf"),
        ("buttons", 2, 40, "o"), ("drawers", 2, 12, "o"), ("settings", 2, 30, "o"), ("wheels", 2, 12, "o"),
        ("inhabitants", 90, 900000, "t"), ("bridges", 2, 60, "t"), ("churches", 2, 40, "t"), ("schools", 2, 90, "t"),
        ("hotels", 2, 140, "t"), ("grandchildren", 2, 20, "f"), ("bicycles", 2, 9, "f"), ("fruit trees", 2, 70, "f"),
        ("floors", 2, 60, "b"), ("windows", 4, 800, "b"), ("steps", 10, 700, "b"), ("parking spaces", 2, 900, "b"),
        ("lifts", 2, 16, "b"))),
}

_PLAIN = ("The {a} of {e} is {v}.", "{e}'s {a} is {v}.", "{v} is the {a} of {e}.", "{a^} of {e}: {v}.",
          "As for {e}, the {a} is {v}.", "We have noted {v} as the {a} of {e}.", "{e}'s {a}: {v}.",
          "In the file on {e}, the {a} is given as {v}.")
_WHAT = ("What is the {a} of {e}?", "Tell me the {a} of {e}.", "{e} - {a}?", "Could you tell me {e}'s {a}?",
         "Do you know what the {a} of {e} is?", "State the {a} of {e}.", "Give me {e}'s {a}, please.",
         "I'd like to know the {a} of {e}.")
_TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "thing": (
        (*_PLAIN, "{e} has {v} as {a}.", "Everybody knows that the {a} of {e} is {v}.",
         "For {e}, the {a} is {v}.", "Under {a}, the entry for {e} says {v}."),
        (*_WHAT, "What does {e} have as {a}?", "For {e}, what's the {a}?", "What is {e}'s {a}?",
         "What is given as the {a} of {e}?")),
    "code": (
        (*_PLAIN, "Please write down {v} as the {a} of {e}.", "You'll need the {a} of {e}, which is {v}.",
         "{e} has the {a} {v}.", "The {a} for {e} is {v}."),
        (*_WHAT, "Which {a} does {e} have?", "I need the {a} of {e}. What is it?", "What is {e}'s {a}?",
         "What is the {a} for {e}?")),
    "person": (
        ("The {a} of {e} is {v}.", "{v} is the {a} of {e}.", "{a^} of {e}: {v}.", "The name of {e}'s {a} is {v}.",
         "As {a} of {e} we have {v} on record.", "Ask {v}, the {a} of {e}.", "{e} has {v} as {a}.",
         "Everyone knows {v} to be the {a} of {e}.", "{e}'s {a}: {v}.", "For {e}, the {a} is {v}.",
         "{e}'s {a} is {v}.", "The {a} of {e} is called {v}."),
        ("Who is the {a} of {e}?", "What is the name of {e}'s {a}?", "Tell me who the {a} of {e} is.", "{e} - {a}?",
         "Do you know the {a} of {e}?", "Name the {a} of {e}.", "Could you say who {e} has as {a}?",
         "By what name does the {a} of {e} go?", "I'm looking for the {a} of {e}. Who is it?",
         "Whom does {e} have as {a}?", "Who is {e}'s {a}?", "What is the {a} of {e} called?")),
    "clock": (
        ("The {a} of {e} is at {v}.", "{e}'s {a} is at {v}.", "At {v} it's time for the {a} of {e}.",
         "{a^} of {e}: {v}.",
         "{e} has the {a} set for {v}.", "{v} is the time of the {a} of {e}.", "The time of {e}'s {a} is {v}.",
         "With {e}, the {a} comes at {v}.", "Note that the {a} of {e} is now at {v}.", "{e}'s {a}: {v}.",
         "For {e}, the {a} is at {v}.", "The {a} of {e} is set for {v}."),
        ("When is the {a} of {e}?", "At what time is the {a} of {e}?", "{e} - {a}?", "Tell me the time of {e}'s {a}.",
         "What time is {e}'s {a} set for?", "Do you know when the {a} of {e} is?", "At what hour is {e}'s {a}?",
         "Could you tell me when {e} has the {a}?", "State the time of the {a} of {e}.",
         "For what time is the {a} of {e} set?",
         "When is {e}'s {a}?", "What time is the {a} of {e}?")),
    "date": (
        ("The {a} of {e} is on {v}.", "{e}'s {a} falls on {v}.", "On {v} it's the {a} of {e}.", "{a^} of {e}: {v}.",
         "{v} is marked for the {a} of {e}.", "In the calendar, {e}'s {a} is down for {v}.", "{e} has the {a} on {v}.",
         "Remember {v}, because of the {a} of {e}.", "With {e}, the {a} comes on {v}.", "{e}'s {a}: {v}.",
         "For {e}, the {a} is on {v}.", "{e}'s {a} is on {v}."),
        ("When is the {a} of {e}?", "On what day is the {a} of {e}?", "{e} - {a}?", "On which day does {e}'s {a} fall?",
         "Tell me the day of {e}'s {a}.", "Do you know when the {a} of {e} is?",
         "Which day is marked for the {a} of {e}?",
         "What day should I remember for the {a} of {e}?", "Could you tell me when {e} has the {a}?",
         "State the day of the {a} of {e}.", "When is {e}'s {a}?", "What day is the {a} of {e}?")),
    "place": (
        ("The {a} of {e} is {v}.", "{e}'s {a} is {v}.", "{v} is the {a} of {e}.", "{a^} of {e}: {v}.",
         "For the {a} of {e}, go to {v}.", "{e} has {v} as {a}.", "If you look for {e}'s {a}, the answer is {v}.",
         "As the {a} of {e}, {v} is named.", "{e}'s {a}: {v}.", "We were told that the {a} of {e} is {v}.",
         "For {e}, the {a} is {v}.", "{e}'s {a} is listed as {v}."),
        ("Where is the {a} of {e}?", "What is the {a} of {e}?", "{e} - {a}?", "Tell me where {e}'s {a} is.",
         "Which place is the {a} of {e}?", "Do you know where the {a} of {e} is?", "Name the {a} of {e}.",
         "I'm looking for the {a} of {e}. Where is it?", "Could you tell me {e}'s {a}?", "Where does {e} have the {a}?",
         "Where is {e}'s {a}?", "What place is {e}'s {a}?")),
    "spot": (
        ("The {a} of {e} is {v}.", "{e} keeps the {a} {v}.", "You'll find the {a} of {e} {v}.", "{a^} of {e}: {v}.",
         "Look {v} for the {a} of {e}.", "{e} has the {a} {v}.", "The {a} that belongs to {e} is {v}.",
         "If you need the {a} of {e}, it is {v}.", "{v} is where the {a} of {e} is.", "{e}'s {a}: {v}.",
         "{e}'s {a} is {v}.", "The {a} of {e} can be found {v}."),
        ("Where is the {a} of {e}?", "Where does {e} keep the {a}?", "{e} - {a}?", "Where do I find the {a} of {e}?",
         "Tell me where {e}'s {a} is.", "Do you know where {e} has the {a}?",
         "I need the {a} of {e}. Where should I look?",
         "In what spot is the {a} of {e}?", "Where can I get hold of {e}'s {a}?", "Describe where the {a} of {e} is.",
         "Where is {e}'s {a}?", "Where can the {a} of {e} be found?")),
    "much": (
        (*_PLAIN, "{e} has the following {a}: {v}.", "The {a} of {e} comes to {v}.", "For {e}, the {a} is {v}.",
         "{e} has a listed {a} of {v}."),
        (*_WHAT, "How much does the {a} of {e} come to?", "What figure is given for the {a} of {e}?",
         "What is {e}'s {a}?",
         "What {a} does {e} have?")),
    "many": (
        ("{e} has {v} {a}.", "The number of {a} of {e} is {v}.", "There are {v} {a} that belong to {e}.",
         "{a^} of {e}: {v}.",
         "At last count {e} had {v} {a}.", "Someone counted the {a} of {e} and got {v}.", "{e} can boast {v} {a}.",
         "{v} is the number of {a} of {e}.", "{e}'s {a} number {v}.", "With {v} {a}, {e} is well provided for.",
         "{e} has a total of {v} {a}.", "In all, {e} has {v} {a}."),
        ("How many {a} does {e} have?", "What is the number of {a} of {e}?", "{e} - how many {a}?",
         "Tell me how many {a} {e} has.", "Do you know the number of {e}'s {a}?", "How many {a} belong to {e}?",
         "Could you tell me how many {a} there are for {e}?", "State the number of {a} of {e}.",
         "How many {a} can {e} boast?", "Count the {a} of {e}: how many?",
         "How many {a} has {e} got?", "How many {a} does {e} have in all?")),
}
_UNIQUE = frozenset(("code", "person"))
_INVERSE = {"code": ("Whose {a} is {v}?", "Which one has the {a} {v}?", "{v} is the {a} of what or whom?",
                     "What is {v} the {a} of?", "To which entry does the {a} {v} belong?",
                     "Which name goes with the {a} {v}?"),
            "person": ("Of what or whom is {v} the {a}?", "Which one has {v} as {a}?", "Whose {a} is {v}?",
                       "{v} is the {a} of which one?", "Which name goes with {v} as {a}?",
                       "To which entry does {v} belong as {a}?")}
_NO_INVERSE = frozenset(("blood group", "shoe size", "bus line", "house number", "locker number", "founding year",
                         "construction year", "year of manufacture"))


def _relation(kind: str, attribute: str, value: Sampler) -> Relation:
    """The relation of one attribute, its templates taken from those of its kind."""
    label = attribute[0].upper() + attribute[1:]

    def fill(templates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(text.replace("{a^}", label).replace("{a}", attribute) for text in templates)

    statements, questions = _TEMPLATES[kind]
    inverse = _INVERSE[kind] if kind in _UNIQUE and attribute not in _NO_INVERSE else ()
    return Relation(attribute.replace(" ", "_").replace("-", "_"), label, value, fill(statements), fill(questions),
                    fill(inverse))


def _relations(letter: str) -> tuple[Relation, ...]:
    """All relations that make sense for the entity kind of this letter."""
    return tuple(_relation(kind, attribute, value) for kind, specs in _SPECS.items()
                 for attribute, value, letters in specs if letter in letters)


_FEMALE = choice("Anna", "Marta", "Ines", "Olga", "Priya", "Zoe", "Clara", "Fatima", "Greta", "Hannah", "Ingrid",
    "Julia",
                 "Keiko", "Laura", "Mei", "Nadia", "Petra", "Rosa", "Sofia", "Teresa", "Ursula", "Vera", "Wanda",
                 "Yara",
                 "Agnes", "Beatrice", "Carmen", "Dora", "Elena", "Freya", "Helen", "Irene", "Joan", "Lucy", "Amara",
                 "Noor")
_MALE = choice("Adam", "Boris", "Carlos", "David", "Erik", "Felix", "George", "Hugo", "Ivan", "Jacob", "Karl", "Leon",
               "Marco", "Nils", "Omar", "Paul", "Rafael", "Samir", "Thomas", "Victor", "Walter", "Yusuf", "Anton",
               "Bruno",
               "Cedric", "Dmitri", "Emil", "Frank", "Henry", "Jonas", "Kenji", "Luis", "Martin", "Oscar", "Peter",
               "Tariq")
_FILLER = (
    "Please treat this with care.", "The list was checked last week.", "More will be added later.",
    "Nothing else is known.",
    "Thank you for reading.", "Some details may change.", "Any mistakes are our own.", "We keep a copy in the archive.",
    "This page was typed in a hurry.", "Ask at the desk if something is unclear.", "Old notes have been thrown away.",
    "Much has been said about {e}.", "We have known {e} for a long time.", "The rest is of no importance.",
    "It took a while to gather all this.", "There is a photo on the back.", "These notes are about {e}.")
_TITLES = ("{e}", "Notes on {e}", "{e} - data sheet", "Facts about {e}", "Index card", "Short notes", "About {e}",
           "What we know about {e}", "File: {e}")
_GROUPS = ("Notes", "Index cards", "Facts and figures", "Our list", "Collected notes", "Overview", "From the files")


def _domain(name: str, letter: str, entity: Sampler, nouns: tuple[str, ...], column: str,
            pronouns: tuple[str, str, str] = ("it", "it", "its")) -> Domain:
    """A domain of one entity kind."""
    return Domain(f"anything_{name}", entity, _relations(letter), _TITLES, _GROUPS, _FILLER, nouns, pronouns, column)


DOMAINS: tuple[Domain, ...] = (
    _domain("women", "p", compose("{} {}", _FEMALE, surname()), ("this woman", "the lady", "this person"), "Person",
            ("she", "her", "her")),
    _domain("men", "p", compose("{} {}", _MALE, surname()), ("this man", "the gentleman", "this person"), "Person",
            ("he", "him", "his")),
    _domain("companies", "c", proper("Trading", "Works", "Brothers", "Supplies", "Textiles", "Media", "Bakeries",
        "Tools"),
            ("the company", "the firm", "this business"), "Company"),
    _domain("objects", "o", compose("{} {}", brand(), choice(
        "lamp", "radio", "cabinet", "camera", "kettle", "scooter", "clock", "drill", "trolley", "sewing machine",
        "toaster",
        "typewriter", "printer", "mower", "vase", "chest", "fan", "telescope")),
        ("the object", "this item", "the item"), "Object"),
    _domain("places", "t", town(), ("the town", "this place", "the place"), "Place"),
    _domain("families", "f", compose("{} {}", choice("Family", "Clan", "House"), surname()),
            ("the family", "this family", "the household"), "Family"),
    _domain("buildings", "b", proper("House", "Tower", "Hall", "Villa", "Mill", "Court", "Castle", "Lodge"),
            ("the building", "this building", "the house"), "Building"),
)
