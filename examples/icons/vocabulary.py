"""The hundred names that captions are made of, and the icons of each set that show them.

A name stands for three or four drawings, one a set, so no caption has one right picture. Names were kept when a person
recognises every drawing at 64x64 pixels; drawings on a full square of background (some of fxemoji) were left out.
"""

from dataclasses import dataclass

# Name: icon of noto, noto-v1 and fluent-emoji-flat, which share Unicode's names | icon of fxemoji, which has its own.
_TABLE = """
cat: cat-face | cat
dog: dog-face | dog
horse: horse-face | horseface
cow: cow-face | cowface
pig: pig-face | pig
rabbit: rabbit-face | bunny
bear: bear | bear
panda: panda | pandaface
tiger: tiger-face | tiger
lion: lion |
fox: fox | foxsmiling
frog: frog | frog
monkey: monkey-face | monkeyface
penguin: penguin | penguin
owl: owl |
duck: duck |
elephant: elephant | elephant
snake: snake | snake
turtle: turtle | turtle
octopus: octopus | octopus
crab: crab |
fish: fish | fish
whale: spouting-whale | spurtingwhale
snail: snail | snail
butterfly: butterfly |
bee: honeybee | honeybee
spider: spider | spider
sheep: ewe | sheep
apple: red-apple | redapple
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
cake: birthday-cake | birthdaycake
ice cream: ice-cream | icecream
beer: beer-mug | beermug
coffee: hot-beverage | hotbeverage
car: automobile | automobile
bus: bus | bus
truck: delivery-truck | deliverytruck
bicycle: bicycle | bicycle
train: locomotive | steamlocomotive
airplane: airplane | airplane
helicopter: helicopter | helicopter
rocket: rocket | rocket
sailboat: sailboat |
house: house | housebuilding
castle: castle | europeancastle
tent: tent |
volcano: volcano |
balloon: balloon | balloon
umbrella: umbrella | umbrella
sun: sun | whitesun
moon: crescent-moon | crescentmoon
star: star |
cloud: cloud | cloud
rainbow: rainbow |
snowflake: snowflake | snowflake
snowman: snowman-without-snow | snowmanwithoutsnow
fire: fire | fire
tree: deciduous-tree | deciduoustree
pine tree: evergreen-tree | evergreen
palm tree: palm-tree | palmtree
cactus: cactus | cactus
rose: rose | rose
sunflower: sunflower | sunflower
anchor: anchor | anchor
key: key | key
lock: locked | lock
bell: bell | bell
book: closed-book | closedbook
pencil: pencil | pencil
pair of scissors: scissors | blackscissors
clock: alarm-clock | alarmclock
camera: camera | camera
light bulb: light-bulb | lightbulb
guitar: guitar | guitar
crown: crown | crown
hat: top-hat | tophat
pair of glasses: glasses | glasses
shirt: t-shirt | mansshirt
heart: red-heart | redheart
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
    unicode_icon: str
    """Its icon in every set that uses Unicode's names."""
    fxemoji_icon: str | None

    @property
    def with_article(self) -> str:
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def icon_of(self, set_name: str) -> str | None:
        """Return this subject's icon in a set; None where the set has no fitting one."""
        return self.fxemoji_icon if set_name == "fxemoji" else self.unicode_icon


def _subject(line: str) -> Subject:
    name, icons = line.split(":")
    unicode_icon, fxemoji_icon = (part.strip() for part in icons.split("|"))
    return Subject(name, unicode_icon, fxemoji_icon or None)


SUBJECTS = tuple(_subject(line) for line in _TABLE.strip().splitlines())
