"""Words that the tasks are made of.

No word lies inside another, so that an answer is never found by accident in a longer word.
"""


def listed(text: str) -> tuple[str, ...]:
    """Returns the words of a text, a form in which a list of them is easier to read."""
    return tuple(text.split())


ADJECTIVES = listed(
    """
    abrupt amber ancient antique arctic awkward azure balmy bashful bitter blunt bold brave
    breezy brisk brittle bumpy calm candid careful cheerful chilly civil clever clumsy coarse
    cozy crimson crisp crooked curious dainty daring dazzling decent dense dim distant dizzy
    drowsy dusty eager earnest eerie elegant emerald faint faithful famous fancy fearless
    feeble fierce flimsy fluffy fragile frantic fresh frosty frozen frugal gentle giddy gifted
    glad gleaming gloomy glossy golden graceful grand gritty grumpy hasty hazy hearty hollow
    honest humble hungry idle jolly joyful keen kindly lavish lazy lively lonely loyal mellow
    merry mighty misty modest muddy murky narrow nimble noble obscure odd pale patient
    peculiar placid playful plucky polite prickly proud prudent puzzled quaint quick quiet
    rapid rare restless robust rosy rugged rusty sacred scarlet secret serene shabby shady
    shallow sharp shiny silent silky sincere sleepy slender slim sly smooth snug sober solemn
    sour spicy spry stable stale steady steep sturdy subtle sudden sullen sunny supple swift
    tame tender tepid thirsty thorough tidy timid tiny tough tranquil trim unruly upbeat vague
    vast velvet violet vivid wary weary whole wicked wild wise witty wobbly wooden yellow
    young zealous
    """
)

NOUNS = listed(
    """
    acorn airport album almond anchor ankle anvil apple apron atlas avenue badge bagel bakery
    balcony bamboo banjo banner barrel basin basket beacon beaver bell berry bicycle biscuit
    blanket blossom bonnet bottle boulder bracelet branch breeze brick bridge broom bucket
    buffalo bundle butter button cabbage cabin cactus camel camera candle canoe canyon carpet
    carrot castle cedar cellar cello cherry chimney cinema circle clock clover cobweb coconut
    comet compass copper coral cotton cradle crater cricket crystal cushion dagger daisy
    desert diamond dolphin donkey dragon drawer drum eagle elbow engine falcon farmer feather
    fiddle finger flask flute fossil fountain garden garlic gazelle giraffe glacier glove
    goblet gondola granite guitar hammer hammock harbor hawk hazelnut helmet heron hinge honey
    hornet hotel igloo insect island ivory jacket jaguar jasmine jelly jewel jigsaw journal
    jungle kayak kennel kettle kitten ladder lagoon lantern lasso lemon leopard lettuce
    library lilac lizard lobster locket magnet magpie mango maple marble market meadow medal
    melon mirror mitten monkey mountain muffin museum mustard napkin needle nettle noodle
    nutmeg oasis ocean olive onion orchard orchid otter oyster paddle palace panther parrot
    peach peanut pebble pelican pencil pepper piano pigeon pillow pirate planet pocket pony
    poppy potato prairie puddle pumpkin puppet pyramid quarry quartz quill quilt rabbit
    raccoon radish raisin raven ribbon rifle river robin rocket saddle sailor salmon sandal
    saucer scarf scooter shadow shovel sparrow sphinx spider spinach spoon squirrel statue
    stove summit sunset swamp syrup teapot temple thimble thistle thunder ticket tiger toaster
    tomato torch tower tractor trumpet tulip tunnel turnip turtle umbrella urchin valley vase
    village vine violin volcano waffle wagon walnut walrus weasel whale whistle willow window
    winter wizard yacht yogurt zebra zipper
    """
)

VERBS = listed(
    """
    accept admire advise amuse announce appear applaud argue arrive assist attach attend avoid
    balance bathe behave believe blink boast borrow bounce breathe bury celebrate chase choose
    climb collect combine complain confess confuse consider copy crawl create dance decide
    decorate delay deliver depend describe deserve destroy develop discover divide dream
    educate embrace employ enjoy escape examine excuse exist expand explain explore extend
    fetch fill float follow forgive gather giggle greet guess hatch hope hover hurry identify
    ignore imagine improve include inform invent invite juggle jump kneel laugh launch learn
    listen manage measure memorize mention mumble notice obey observe obtain occupy offer
    paint permit persuade plant please polish ponder pour practice praise prefer prepare
    pretend prevent produce promise protect provide punish pursue push question realize
    receive recite recognize reduce reflect refuse regret rejoice relax rely remember remind
    repair repeat replace reply request rescue retire rinse roam rotate scatter scratch
    scribble search select separate sew shiver shrug sigh signal skate sketch smile sneeze
    solve spill splash squeeze stagger stretch stroll stumble suggest supply support surprise
    suspect swallow swim tackle tease tempt thank tickle translate travel tremble trust twist
    unite unpack vanish visit wander warn wave weave welcome whisper wink wonder worry wrestle
    yawn
    """
)

WORDS = ADJECTIVES + NOUNS + VERBS
