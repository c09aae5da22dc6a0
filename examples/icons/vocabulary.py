"""The hundred names that captions are made of, and the icons of each set that show them.

A name stands for three to sixteen drawings, so no caption has one right picture. Names were kept when a person
recognises every drawing at 64x64 pixels; drawings on a full square of background (some of fxemoji) were left out.
"""

from dataclasses import dataclass

# Name: icons of noto, noto-v1 and fluent-emoji-flat, which share Unicode's names | icons of fxemoji, which has its own.
_TABLE = """
cat: cat-face cat | cat catside
dog: dog-face dog | dog dogside
horse: horse-face horse | horseface horse
cow: cow-face cow | cowface cow
pig: pig-face pig | pig pigside
rabbit: rabbit-face rabbit | bunny bunnyside
bear: bear | bear
panda: panda | pandaface
tiger: tiger-face tiger | tiger tigerside
lion: lion |
fox: fox | foxsmiling
frog: frog | frog
monkey: monkey-face monkey | monkeyface monkey
penguin: penguin | penguin
owl: owl |
duck: duck |
elephant: elephant | elephant
snake: snake | snake
turtle: turtle | turtle
octopus: octopus | octopus
crab: crab |
fish: fish tropical-fish | fish tropicalfish
whale: spouting-whale whale | spurtingwhale whale
snail: snail | snail
butterfly: butterfly |
bee: honeybee | honeybee
spider: spider | spider
sheep: ewe | sheep
apple: red-apple green-apple | redapple greenapple
banana: banana | banana
lemon: lemon | lemon
orange: tangerine | tangerine
pair of cherries: cherries | cherries
strawberry: strawberry | strawberry
bunch of grapes: grapes | grapes
watermelon: watermelon | watermelon
pineapple: pineapple | pineapple
tomato: tomato | tomato
carrot: carrot |
mushroom: mushroom | mushroom
piece of cheese: cheese-wedge |
pizza: pizza | sliceofpizza
burger: hamburger | hamburger
box of fries: french-fries | frenchfries
hot dog: hot-dog |
donut: doughnut | doughnut
cake: birthday-cake shortcake | birthdaycake shortcake
ice cream: ice-cream soft-ice-cream | icecream softicecream
beer: beer-mug | beermug
coffee: hot-beverage | hotbeverage
car: automobile sport-utility-vehicle | automobile
bus: bus | bus
truck: delivery-truck | deliverytruck
bicycle: bicycle | bicycle
train: locomotive | steamlocomotive
airplane: airplane | airplane
helicopter: helicopter | helicopter
rocket: rocket | rocket
sailboat: sailboat |
house: house house-with-garden | housebuilding housewithgarden
castle: castle | europeancastle
tent: tent |
volcano: volcano |
balloon: balloon | balloon
umbrella: umbrella umbrella-with-rain-drops | umbrella umbrellawithraindrops
sun: sun sun-with-face | whitesun sunwithface
moon: crescent-moon | crescentmoon
star: star |
cloud: cloud | cloud
rainbow: rainbow |
snowflake: snowflake | snowflake
snowman: snowman-without-snow snowman | snowmanwithoutsnow
fire: fire | fire
tree: deciduous-tree | deciduoustree
pine tree: evergreen-tree | evergreen
palm tree: palm-tree | palmtree
cactus: cactus | cactus
rose: rose | rose
sunflower: sunflower | sunflower
anchor: anchor | anchor
key: key old-key | key oldkey
lock: locked | lock
bell: bell | bell
book: closed-book green-book blue-book orange-book | closedbook greenbook bluebook orangebook
pencil: pencil | pencil lowerleftpencil
pair of scissors: scissors | blackscissors
clock: alarm-clock mantelpiece-clock | alarmclock manltepiececlock
camera: camera camera-with-flash | camera camerawithflash
light bulb: light-bulb | lightbulb
guitar: guitar | guitar
crown: crown | crown
hat: top-hat womans-hat | tophat womanshat
pair of glasses: glasses sunglasses | glasses darksunglasses
shirt: t-shirt | mansshirt
heart: red-heart blue-heart green-heart | redheart heartgreen
trophy: trophy | trophy
gift: wrapped-gift | present
robot: robot |
ghost: ghost | ghost
skull: skull | skull
"""


@dataclass(frozen=True)
class Subject:
    """One name and where its drawings are."""

    name: str
    """As captions say it, without its article."""
    unicode_icons: tuple[str, ...]
    """Icons of every set that uses Unicode's names."""
    fxemoji_icons: tuple[str, ...]

    @property
    def with_article(self) -> str:
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def icons_of(self, set_name: str) -> tuple[str, ...]:
        """Return this subject's icons in a set; empty where the set has no fitting one."""
        return self.fxemoji_icons if set_name == "fxemoji" else self.unicode_icons


def _subject(line: str) -> Subject:
    name, icons = line.split(":")
    unicode_icons, fxemoji_icons = icons.split("|")
    return Subject(name, tuple(unicode_icons.split()), tuple(fxemoji_icons.split()))


SUBJECTS = tuple(_subject(line) for line in _TABLE.strip().splitlines())
