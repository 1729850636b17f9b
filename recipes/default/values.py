"""Values that users say and calls repeat: names, places, dates, codes, numbers, short texts.

Two worlds that share none of their words: what is trained on, and what the held-out set asks about. Half of the names
and places are made of syllables, so that there are more of them than a model can remember; it has to copy. Numbers,
times and letters of codes are everybody's. Draws only from the `random.Random` that it is given.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for word in text.split())


_FIRST = _words(
    "Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karin Leo Maria Nina Oscar Paula Quentin Rosa Simon Tina "
    "Umar Vera Walter Xenia Yusuf Zoe Ahmed Bianca Chloe Diego Emma Farid Gina Hannah Ivan Julia Kenji Laura Mateo "
    "Noah Olivia Pedro Ravi Sara Tomas Ursula Victor Wendy Yara Zain Alice Bruno Clara Daniel Eva Frank Greta Henry "
    "Isabel Jack Kate Liam Mona Nora Omar Peter Ruth Sofia Theo Vanessa Will Amara Chen Fatima Hiro Lucia Mei Priya "
    "Samuel Tariq Wei Anita Boris Cecilia Dmitri Esther Fiona Gustav Helena Igor Joanna Kofi Lars Miriam Nadia Pavel"
)
_FIRST_HELD = _words(
    "Agatha Baltasar Cosima Dorian Evangeline Florian Gwendolyn Horatio Ingrid Jasper Kassandra Lionel Marguerite "
    "Nikolai Ottilie Percival Rafaela Sebastian Thaddeus Valentina Winifred Yolanda Zacharias Anselm Brunhilde "
    "Constance Desmond Eleanor Ferdinand Genevieve Harriet Isolde Josephine Konrad Leopold Millicent Norbert Octavia "
    "Philippa Roderick Seraphina Tobias"
)
_LAST = _words(
    "Smith Jones Brown Garcia Miller Davis Lopez Wilson Martin Lee Clark Lewis Walker Hall Young King Wright Hill Scott "
    "Green Adams Baker Nelson Carter Mitchell Perez Roberts Turner Phillips Campbell Parker Evans Edwards Collins Reyes "
    "Stewart Morris Cook Rogers Morgan Bell Murphy Bailey Cooper Kim Cox Ward Peterson Gray Ramirez Watson Brooks Kelly "
    "Sanders Price Bennett Wood Ross Powell Fisher Novak Muller Rossi Tanaka Silva Ivanov Kowalski Nielsen Haddad Okafor"
)
_LAST_HELD = _words(
    "Abernathy Bloomfield Castellanos Drummond Eisenberg Fitzgerald Grunewald Holloway Ibarra Jankowski Kingsley Lindqvist "
    "Montague Nakamura Oppenheim Pemberton Quackenbush Rutherford Szymanski Thornbury Underhill Vandermeer Wetherby "
    "Yamaguchi Zimmermann Ashworth Beaumont Cavendish Delacroix Ellsworth"
)
_CITIES = _words(
    "London Paris Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin Oslo Stockholm Helsinki Copenhagen Athens Budapest "
    "Zagreb Brussels Amsterdam Zurich Geneva Munich Hamburg Milan Naples Barcelona Seville Porto Lyon Marseille Boston "
    "Chicago Denver Seattle Austin Dallas Houston Miami Atlanta Detroit Toronto Montreal Vancouver Mexico_City Lima Bogota "
    "Santiago Buenos_Aires Sao_Paulo Cairo Nairobi Lagos Accra Cape_Town Istanbul Dubai Delhi Mumbai Chennai Bangkok "
    "Singapore Jakarta Manila Tokyo Osaka Kyoto Seoul Beijing Shanghai Sydney Melbourne Auckland San_Francisco New_York "
    "Los_Angeles Philadelphia Phoenix San_Diego Portland Cleveland Glasgow Leeds Bristol Cardiff Cologne Turin Krakow Riga"
)
_CITIES_HELD = _words(
    "Antwerp Bergen Coimbra Dresden Edinburgh Freiburg Gdansk Heidelberg Innsbruck Kaunas Ljubljana Malaga Nuremberg Odense "
    "Palermo Rotterdam Salzburg Tampere Utrecht Valencia Winnipeg Yokohama Zaragoza Albuquerque Baltimore Cincinnati "
    "Des_Moines Fort_Worth Honolulu Indianapolis Kansas_City Louisville Milwaukee New_Orleans Omaha Pittsburgh Sacramento "
    "Tucson Nagoya Perth"
)
_THINGS = _words(
    "laptop desk_lamp office_chair backpack bicycle coffee_machine headphones keyboard monitor umbrella tent camera printer "
    "suitcase blender sofa bookshelf toaster vacuum_cleaner water_bottle notebook guitar violin drone tripod jacket boots "
    "helmet ladder drill hammer paint_roller garden_hose mirror carpet pillow blanket fan heater router tablet phone_case "
    "charger speaker microphone projector whiteboard stapler scanner mouse webcam kettle teapot frying_pan knife_set "
    "cutting_board candle vase picture_frame wall_clock alarm_clock yoga_mat dumbbell tennis_racket football skateboard"
)
_THINGS_HELD = _words(
    "telescope accordion typewriter hammock wheelbarrow chandelier sewing_machine surfboard harmonica pressure_cooker "
    "rocking_chair snow_shovel trampoline binoculars cello wine_rack waffle_iron sleeping_bag fishing_rod record_player "
    "tool_belt rice_cooker globe easel metronome chess_clock bird_feeder pasta_maker kayak lawn_mower"
)
_TOPICS = _words(
    "solar_energy jazz_music deep_sea_fish ancient_Rome electric_cars machine_learning bread_baking chess_openings volcanoes "
    "black_holes climate_policy remote_work healthy_snacks garden_design street_food modern_art marathon_training bird_watching "
    "coffee_roasting web_security city_planning film_history robot_arms sleep_habits stock_markets language_learning wind_power "
    "space_travel green_tea folk_dance water_filters board_games hiking_trails vegan_recipes old_maps child_nutrition "
    "public_transport data_privacy rare_metals ocean_currents tax_law online_courses urban_farming dog_training home_repair "
    "sailing photography crime_novels pottery beekeeping digital_money heart_health rail_travel battery_storage"
)
_TOPICS_HELD = _words(
    "medieval_castles glacier_melting opera_singing truffle_hunting lighthouse_restoration quantum_sensors silk_weaving "
    "mushroom_foraging arctic_foxes cheese_aging alpine_railways puppet_theatre tidal_power clock_making desert_plants "
    "calligraphy coral_reefs falconry bonsai_care meteor_showers organ_music shipwrecks perfume_making rope_bridges "
    "solar_eclipses wool_dyeing ice_climbing fossil_hunting stained_glass peat_bogs"
)
_ADJECTIVES = _words("red blue quiet golden silent bright hidden early summer winter final broken lucky northern open new old small wild slow")
_ADJECTIVES_HELD = _words("crimson velvet hollow distant amber frozen wandering forgotten restless gentle marble scarlet")
_NOUNS = _words("river garden house road light window morning forest city harbor mountain bridge letter song storm island market tower field train")
_NOUNS_HELD = _words("lantern orchard cathedral sparrow compass meadow fountain carousel glacier violinist almanac threshold")
_DOMAINS = _words("example.com mail.com post.org inbox.net acme.io shop.com school.edu office.net web.de company.com")
_DOMAINS_HELD = _words("brightmail.example northgate.example papermill.example harbourview.example talloaks.example")
_SYLLABLES = (_words("ba be bo da de do fa fi ga go ka ke ko la le li lo ma me mi mo na ne no pa pe ra re ri ro sa se so ta te ti to va ve"),
              _words("n r l s t m nd rt x k lin ton ger vic dor mar sen wick") )
_SYLLABLES_HELD = (_words("bri cha dro fle glu hwe jai kry phi que shu swa thro vla wha zhi yu"), _words("ff mph lch sk bbe gno zz pp rrow dge"))

_MESSAGES = (
    ("the meeting starts at {time}", "I will be {n} minutes late", "please call me back", "the keys are under the mat", "the package has arrived",
     "dinner is ready", "do not forget the {thing}", "the {thing} is broken", "we need more {thing}s", "happy birthday", "the train is delayed",
     "see you on {day}", "thanks for the {thing}", "the report is finished", "lunch is at {time}", "the room has changed to {n}", "buy {thing} and milk",
     "the {adj} {noun} is closed", "pick up the {thing}", "water the plants", "I have sent the files", "the invoice is paid", "good luck {day}",
     "bring the {thing} to room {n}", "the {noun} looks great", "order {n} {thing}s", "my new number is {n}", "check the {thing}"),
    ("the violin lesson moved to {time}", "the plumber comes on {day}", "leave the {thing} at the gate", "the {adj} {noun} opens soon", "your table is booked",
     "grandma lands at {time}", "the {thing} needs a new handle", "all {n} guests have confirmed", "feed the cat twice", "the choir rehearsal is cancelled",
     "the roof is leaking again", "return the {thing} to locker {n}"),
)  # fmt: skip
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_COUNTRIES = _words("Germany France Spain Italy Poland Japan Brazil Canada Kenya India Norway Sweden Mexico Egypt Chile Peru Greece Ireland Turkey Vietnam")
_COUNTRIES_HELD = _words("Portugal Finland Uruguay Iceland Slovenia Malaysia Morocco Belgium Bolivia Namibia")
_LANGUAGES = _words("German French Spanish Italian Polish Japanese Korean Arabic Hindi Turkish Swedish Greek Dutch Russian Chinese")
_LANGUAGES_HELD = _words("Portuguese Finnish Icelandic Hungarian Welsh Swahili Catalan Norwegian")
_FOODS = _words("pizza sushi pasta tacos ramen salad burgers soup curry paella noodles pancakes dumplings falafel risotto lasagna omelette chili")
_FOODS_HELD = _words("goulash moussaka gnocchi ceviche pierogi ratatouille bibimbap couscous borscht empanadas")
_COLOURS = _words("red blue green yellow white black orange purple pink brown grey")
_COLOURS_HELD = _words("turquoise maroon beige indigo teal ivory")


@dataclass(frozen=True)
class Values:
    """A world of values. `held_out` ones have words that no training value has."""

    rng: random.Random
    held_out: bool = False

    def _of(self, training: Sequence[str], held_out: Sequence[str]) -> str:
        return self.rng.choice(held_out if self.held_out else training)

    def _made_up(self) -> str:
        starts, ends = _SYLLABLES_HELD if self.held_out else _SYLLABLES
        return ("".join(self.rng.choices(starts, k=self.rng.choice((1, 2, 2)))) + self.rng.choice(ends)).capitalize()

    def first_name(self) -> str:
        return self._made_up() if self.rng.random() < 0.3 else self._of(_FIRST, _FIRST_HELD)

    def last_name(self) -> str:
        return self._made_up() if self.rng.random() < 0.4 else self._of(_LAST, _LAST_HELD)

    def person(self) -> str:
        return f"{self.first_name()} {self.last_name()}" if self.rng.random() < 0.7 else self.first_name()

    def city(self) -> str:
        return self._made_up() if self.rng.random() < 0.25 else self._of(_CITIES, _CITIES_HELD)

    def country(self) -> str:
        return self._of(_COUNTRIES, _COUNTRIES_HELD)

    def language(self) -> str:
        return self._of(_LANGUAGES, _LANGUAGES_HELD)

    def thing(self) -> str:
        return self._of(_THINGS, _THINGS_HELD)

    def food(self) -> str:
        return self._of(_FOODS, _FOODS_HELD)

    def colour(self) -> str:
        return self._of(_COLOURS, _COLOURS_HELD)

    def topic(self) -> str:
        return self._of(_TOPICS, _TOPICS_HELD)

    def title(self) -> str:
        words = (self._of(_ADJECTIVES, _ADJECTIVES_HELD), self._of(_NOUNS, _NOUNS_HELD))
        return " ".join(word.capitalize() for word in (("The", *words) if self.rng.random() < 0.4 else words))

    def company(self) -> str:
        return f"{self._made_up()} {self.rng.choice(('Ltd', 'Inc', 'Group', 'Labs', 'Foods', 'Bank', 'Motors', 'Media'))}"

    def street(self) -> str:
        street = self._of(_NOUNS, _NOUNS_HELD).capitalize()
        return f"{self.rng.randint(1, 240)} {street} {self.rng.choice(('Street', 'Road', 'Avenue', 'Lane'))}"

    def message(self) -> str:
        text = self.rng.choice(_MESSAGES[self.held_out]).format(
            time=self.time(), n=self.rng.randint(2, 60), thing=self.thing(), day=self.rng.choice(_DAYS),
            adj=self._of(_ADJECTIVES, _ADJECTIVES_HELD), noun=self._of(_NOUNS, _NOUNS_HELD),
        )  # fmt: skip
        return text if self.rng.random() < 0.4 else text[0].upper() + text[1:]

    def email(self) -> str:
        name = self.first_name().lower()
        if self.rng.random() < 0.5:
            name += f".{self.last_name().lower()}"
        return f"{name}@{self._of(_DOMAINS, _DOMAINS_HELD)}"

    def url(self) -> str:
        path = f"/{self._of(_NOUNS, _NOUNS_HELD)}" if self.rng.random() < 0.6 else ""
        return f"https://{self._made_up().lower()}.{self.rng.choice(('com', 'org', 'net'))}{path}"

    def file_name(self) -> str:
        stem = f"{self._of(_ADJECTIVES, _ADJECTIVES_HELD)}_{self._of(_NOUNS, _NOUNS_HELD)}"
        return f"{stem}.{self.rng.choice(('txt', 'pdf', 'csv', 'png', 'docx', 'json'))}"

    def code(self) -> str:
        letters = lambda k: "".join(self.rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=k))  # noqa: E731
        digits = lambda k: "".join(self.rng.choices("0123456789", k=k))  # noqa: E731
        shape = self.rng.randrange(5)
        if shape == 0:
            return f"{letters(2)}-{digits(4)}"
        if shape == 1:
            return f"{letters(1)}{digits(3)}"
        if shape == 2:
            return f"{letters(3)}-{self.rng.randint(2022, 2027)}-{digits(3)}"
        return f"{letters(2)}{digits(5)}" if shape == 3 else f"{self.rng.randint(1, 9)}{digits(5)}"

    def phone(self) -> str:
        return f"+{self.rng.randint(1, 98)} {self.rng.randint(200, 999)} {self.rng.randint(1000, 9999)}"

    def day(self) -> str:
        first = date(2031, 1, 1) if self.held_out else date(2024, 1, 1)
        return (first + timedelta(days=self.rng.randrange(4 * 365))).isoformat()

    def time(self) -> str:
        return f"{self.rng.randint(6, 22):02}:{self.rng.choice(('00', '15', '30', '45', '10', '20', '05'))}"

    def weekday(self) -> str:
        return self.rng.choice(_DAYS)

    def count(self, low: int = 1, high: int = 12) -> int:
        return self.rng.randint(low, high)

    def number(self, low: float, high: float) -> int | float:
        """A whole one, or one with one or two decimals."""
        if self.rng.random() < 0.5:
            return self.rng.randint(int(low), int(high))
        value = round(self.rng.uniform(low, high), self.rng.choice((1, 2)))
        return int(value) if value == int(value) else value


def distinct_words(held_out: bool) -> frozenset[str]:
    """Every word that stands in one world's lists, in small letters: what tests compare."""
    lists = [
        (_FIRST, _FIRST_HELD), (_LAST, _LAST_HELD), (_CITIES, _CITIES_HELD), (_THINGS, _THINGS_HELD),
        (_TOPICS, _TOPICS_HELD), (_ADJECTIVES, _ADJECTIVES_HELD), (_NOUNS, _NOUNS_HELD), (_COUNTRIES, _COUNTRIES_HELD),
        (_LANGUAGES, _LANGUAGES_HELD), (_FOODS, _FOODS_HELD), (_COLOURS, _COLOURS_HELD), (_DOMAINS, _DOMAINS_HELD),
    ]  # fmt: skip
    return frozenset(value.lower() for pair in lists for value in pair[held_out])
