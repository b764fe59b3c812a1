"""Samplers of values and entity names. Each factory returns a function from a `random.Random` to a string."""

from __future__ import annotations

from random import Random

from hypernet.training.corpus import lexicon
from hypernet.training.corpus.schema import Sampler

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ONSETS = "b br c ch cl d dr f fl g gl gr h j k kl l m n p pl pr qu r s sh sk sl st t th tr v w y z".split()
_NUCLEI = "a e i o u a e i o ai au ea ee ia io oa oo ou".split()
_CODAS = " l m n r s t x d k nd nt rn rt st ck ll sh th  ".split(" ")


def pseudo_word(rng: Random, syllables: int = 2) -> str:
    """A capitalised invented word such as "Brelando"."""
    word = "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + (rng.choice(_CODAS) if i == syllables - 1 or
                   rng.random() < 0.25 else "") for i in range(syllables))
    return word.capitalize()


def choice(*options: str) -> Sampler:
    """One of the given strings."""
    return lambda rng: rng.choice(options)


def one_of(*samplers: Sampler) -> Sampler:
    """One of the given samplers, chosen evenly."""
    return lambda rng: rng.choice(samplers)(rng)


def compose(template: str, *parts: Sampler) -> Sampler:
    """`template` with each `{}` filled from the next sampler."""
    return lambda rng: template.format(*(part(rng) for part in parts))


def number(low: int, high: int, unit: str = "", step: int = 1) -> Sampler:
    """An integer from `low` to `high` inclusive, in multiples of `step`, followed by `unit` if there is one."""
    def sample(rng: Random) -> str:
        value = rng.randrange(low, high + 1, step)
        text = f"{value:,}" if value >= 10000 or (value >= 1000 and rng.random() < 0.5) else str(value)
        return f"{text} {unit}" if unit else text
    return sample


def decimal(low: float, high: float, unit: str = "", digits: int = 1) -> Sampler:
    """A decimal number, followed by `unit` if there is one."""
    return lambda rng: f"{rng.uniform(low, high):.{digits}f}" + (f" {unit}" if unit else "")


def price(low: float, high: float) -> Sampler:
    """A price with its currency, such as "$49.90", "120 euros" or "£8"."""
    def sample(rng: Random) -> str:
        value = rng.uniform(low, high)
        form = rng.randrange(5)
        whole = str(max(1, round(value)))
        return (f"${value:.2f}", f"${whole}", f"{whole} euros", f"£{value:.2f}", f"€{whole}")[form]
    return sample


def percent(low: int = 1, high: int = 95) -> Sampler:
    """A share such as "15%" or "15 percent"."""
    return lambda rng: f"{rng.randint(low, high)}{rng.choice(('%', '%', ' percent'))}"


def clock(first_hour: int = 6, last_hour: int = 22) -> Sampler:
    """A time of day: "9:30", "14:05", "7:45 am", "8 pm"."""
    def sample(rng: Random) -> str:
        hour = rng.randint(first_hour, last_hour)
        minute = rng.choice((0, 0, 5, 10, 15, 20, 25, 30, 30, 35, 40, 45, 50, 55))
        form = rng.randrange(3)
        if form == 0:
            return f"{hour}:{minute:02d}"
        suffix = "am" if hour < 12 else "pm"
        twelve = (hour - 1) % 12 + 1
        return f"{twelve} {suffix}" if minute == 0 else f"{twelve}:{minute:02d} {suffix}"
    return sample


def weekday() -> Sampler:
    """A day of the week."""
    return choice(*WEEKDAYS)


def date(with_year: bool | None = None) -> Sampler:
    """A calendar date: "14 March 2027", "March 14", "3 June"; `with_year=None` mixes both."""
    def sample(rng: Random) -> str:
        day, month, year = rng.randint(1, 28), rng.choice(MONTHS), rng.randint(2019, 2032)
        dated = rng.random() < 0.5 if with_year is None else with_year
        if dated:
            return rng.choice((f"{day} {month} {year}", f"{month} {day}, {year}"))
        return rng.choice((f"{day} {month}", f"{month} {day}"))
    return sample


def year(low: int = 1820, high: int = 2024) -> Sampler:
    """A year."""
    return lambda rng: str(rng.randint(low, high))


def duration(*units: str) -> Sampler:
    """A length of time such as "3 weeks"; default units are minutes, hours, days, weeks, months and years."""
    chosen = units or ("minutes", "hours", "days", "weeks", "months", "years")
    top = {"seconds": 90, "minutes": 90, "hours": 72, "days": 60, "weeks": 16, "months": 36, "years": 15}
    def sample(rng: Random) -> str:
        unit = rng.choice(chosen)
        return f"{rng.randint(2, top.get(unit, 30))} {unit}"
    return sample


def code(pattern: str) -> Sampler:
    """A code by pattern: `A` a capital letter, `0` a digit, anything else itself, e.g. "AA-000" -> "QX-417"."""
    def sample(rng: Random) -> str:
        return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") if c == "A" else rng.choice("0123456789") if c == "0"
                       else c for c in pattern)
    return sample


def any_code() -> Sampler:
    """A code of one of many common patterns."""
    patterns = ("AA-000", "A0000", "AAA-00", "00-AA", "000-000", "AA00", "A-000", "0000", "AAA000", "00000", "A00-00")
    return lambda rng: code(rng.choice(patterns))(rng)


def phone() -> Sampler:
    """A telephone number or an extension."""
    return one_of(code("555-0000"), code("020 7000 0000"), code("0000"), code("01000 000000"))


def first_name() -> Sampler:
    """A given name."""
    return choice(*lexicon.FIRST_NAMES)


def surname() -> Sampler:
    """A family name, real or invented."""
    return lambda rng: rng.choice(lexicon.SURNAMES) if rng.random() < 0.7 else pseudo_word(rng)


def person() -> Sampler:
    """A person's name: "Marta Ellison", sometimes "Dr. Ellison" or "Ms. Kovac"."""
    def sample(rng: Random) -> str:
        if rng.random() < 0.15:
            return f"{rng.choice(('Dr.', 'Ms.', 'Mr.', 'Mrs.', 'Professor'))} {surname()(rng)}"
        return f"{first_name()(rng)} {surname()(rng)}"
    return sample


def email() -> Sampler:
    """An e-mail address on an invented domain."""
    return lambda rng: (f"{rng.choice((first_name()(rng), rng.choice(lexicon.NOUNS), 'info', 'help', 'desk'))}"
                        f"@{pseudo_word(rng)}.{rng.choice(('com', 'org', 'net', 'example'))}").lower().replace(" ", "")


def town() -> Sampler:
    """A town, real or invented."""
    def sample(rng: Random) -> str:
        kind = rng.random()
        if kind < 0.45:
            return rng.choice(lexicon.CITIES)
        if kind < 0.75:
            return pseudo_word(rng)
        endings = ("ford", "ton", "bury", "ham", "wick", "mouth", "field", "dale", "port")
        return pseudo_word(rng, 1) + rng.choice(endings)
    return sample


def street() -> Sampler:
    """A street name such as "Willow Lane"."""
    def sample(rng: Random) -> str:
        first = rng.choice((rng.choice(lexicon.NOUNS).title(), rng.choice(lexicon.SURNAMES), pseudo_word(rng)))
        return f"{first} {rng.choice(('Street', 'Road', 'Lane', 'Avenue', 'Square', 'Way', 'Court', 'Hill'))}"
    return sample


def address() -> Sampler:
    """A street address such as "14 Willow Lane"."""
    return lambda rng: f"{rng.randint(1, 199)} {street()(rng)}"


def room() -> Sampler:
    """A place in a building: "room 214", "the Oak Room", "the third floor", "building C"."""
    places = ("hall", "office", "lobby", "annex", "studio", "workshop")

    def sample(rng: Random) -> str:
        return rng.choice((
            f"room {rng.randint(1, 480)}", f"Room {rng.choice('ABCDEFGH')}{rng.randint(1, 30)}",
            f"the {rng.choice(lexicon.NOUNS).title()} Room", f"building {rng.choice('ABCDEFGHKL')}",
            f"the {rng.choice(('first', 'second', 'third', 'fourth', 'fifth', 'top', 'ground'))} floor",
            f"the {rng.choice(lexicon.ADJECTIVES)} {rng.choice(places)}",
        ))
    return sample


def brand() -> Sampler:
    """A product-like or company-like invented name: "Zelnor", "Kelvo 300", "Brightwater"."""
    def sample(rng: Random) -> str:
        kind = rng.random()
        word = pseudo_word(rng, rng.choice((2, 2, 3)))
        if kind < 0.4:
            return word
        if kind < 0.65:
            models = (str(rng.randint(2, 9)), str(rng.randrange(100, 1000, 50)), "Pro", "Mini", "Plus", "X")
            return f"{word} {rng.choice(models)}"
        return rng.choice(lexicon.ADJECTIVES).title() + rng.choice(lexicon.NOUNS).lower().replace(" ", "")
    return sample


def proper(*heads: str) -> Sampler:
    """A proper name that ends in one of `heads`: proper("Library") -> "Ashgrove Library", "Silver Fox Library"."""
    def sample(rng: Random) -> str:
        first = rng.choice((pseudo_word(rng), rng.choice(lexicon.SURNAMES), rng.choice(lexicon.CITIES),
                            rng.choice(lexicon.NOUNS).title(),
                            f"{rng.choice(lexicon.ADJECTIVES)} {rng.choice(lexicon.NOUNS)}".title()))
        return f"{first} {rng.choice(heads)}"
    return sample


def colour() -> Sampler:
    """A colour, plain or qualified."""
    return lambda rng: (rng.choice(lexicon.COLOURS) if rng.random() < 0.6 else
                        f"{rng.choice(('dark', 'light', 'pale', 'bright', 'deep'))} {rng.choice(lexicon.COLOURS)}")


def material() -> Sampler:
    """A material."""
    return choice(*lexicon.MATERIALS)


def food() -> Sampler:
    """A food or an ingredient."""
    return choice(*lexicon.FOODS)


def job_title() -> Sampler:
    """A job title."""
    return choice(*lexicon.JOB_TITLES)


def phrase() -> Sampler:
    """A short noun phrase of everyday words: "a copper kettle", "the quiet garden", "spare batteries"."""
    def sample(rng: Random) -> str:
        adjective, noun = rng.choice(lexicon.ADJECTIVES), rng.choice(lexicon.NOUNS)
        form = rng.randrange(4)
        article = "an" if adjective[0] in "aeiou" else "a"
        return (f"{article} {adjective} {noun}", f"the {adjective} {noun}", f"{adjective} {noun}", f"the {noun}")[form]
    return sample


def words(count: int = 2) -> Sampler:
    """`count` everyday nouns joined by hyphens, as in a password: "otter-lantern"."""
    return lambda rng: "-".join(rng.choice(lexicon.NOUNS).replace(" ", "") for _ in range(count))
