"""SGLang's compiled kernels do not exist for a plain CPU, but it imports their names. To call one is an error."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*arguments, **options):
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on this CPU")

    return absent
