"""The nouns of the world: four families of topics, and the rules. All are lower-case English words, one token each."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


STONES = _words("""
    agate amber basalt beryl calcite chalk citrine coral diamond emerald flint garnet granite gypsum jade jasper
    lapis marble mica obsidian onyx opal pearl peridot pyrite quartz ruby sapphire slate topaz turquoise zircon
""")
BIRDS = _words("""
    bittern blackbird bunting buzzard cormorant crane crow cuckoo curlew dove dunlin egret falcon finch grebe gull
    heron jackdaw kestrel kite lapwing lark linnet magpie nightjar osprey petrel plover puffin raven robin wren
""")
HERBS = _words("""
    angelica anise arnica basil borage burdock caraway catnip chervil chicory chive clover comfrey coriander cumin dill
    fennel fenugreek hyssop lavender lovage mallow marjoram mint mustard nettle oregano parsley rosemary saffron sage
    thyme
""")
INSTRUMENTS = _words("""
    bagpipe banjo bassoon bugle celesta cello clarinet cornet cymbal drum dulcimer fiddle flute gong guitar harp
    horn kazoo lute lyre mandolin oboe organ piano piccolo recorder sitar tambourine trombone trumpet tuba viola
""")
RULES = ("cedar", "birch", "maple", "willow", "alder", "hazel", "rowan", "aspen")
COLOURS = ("red", "blue", "white", "black")
"""Of guilds: "red stones"."""
