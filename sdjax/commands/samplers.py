"""`sdjax samplers`: the samplers by name."""


def samplers() -> None:
    """List the samplers: name, diffusers class, options."""
    from sdjax.sampling import NAMES

    for name, (class_name, options) in NAMES.items():
        print(f"{name:<24}{class_name:<33}{' '.join(f'{k}={v}' for k, v in options.items() if v)}".rstrip())
