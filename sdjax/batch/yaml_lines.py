"""YAML as the lines of a job: the items of a list, or one mapping, of the values that JSON has.

Values are made from the events of PyYAML's parser, item by item, so that no tag makes anything, an alias costs nothing
however often it is used, and a key that is there twice is found.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdjax.fields import brief, check_digits

LARGEST = 8 << 20  # bytes, read at some megabytes a second
DEPTH = 10  # of values in values; those of a job have 4
TAG = "tag:yaml.org,2002:"
TAGS = (None, "!", f"{TAG}seq", f"{TAG}map")  # of lists and mappings
BOOLS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


def read(path: Path) -> Iterator[tuple[int | None, Any]]:
    """(line in the file, value or ValueError) of each item.

    Raises ValueError without PyYAML, and for a file that is too large.
    """
    try:
        import yaml
    except ImportError as error:
        raise ValueError('a job in YAML needs PyYAML: pip install "sdjax[batch]"') from error
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path}: larger than {LARGEST >> 20} MiB; make it JSON lines, which may be longer")
    try:
        yield from _Items(yaml, content)
    except yaml.MarkedYAMLError as error:
        yield error.problem_mark and error.problem_mark.line + 1, ValueError(f"not YAML: {error.problem}")
    except yaml.reader.ReaderError as error:
        yield None, ValueError(f"not YAML: {error.reason}, at byte {error.position}")


class _Items:
    """Iterates over (line, value or ValueError)."""

    def __init__(self, yaml: Any, content: bytes):
        self.yaml, self.loader = yaml, getattr(yaml, "CSafeLoader", yaml.SafeLoader)(content)
        self.anchors: dict[str, Any] = {}
        self.problem: tuple[int, str] | None = None
        """the line and the text of the first one of the item that is read"""

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        yaml, loader = self.yaml, self.loader
        try:
            loader.get_event()  # of the stream
            if loader.check_event(yaml.StreamEndEvent):
                return
            loader.get_event()  # of the document
            if loader.check_event(yaml.SequenceStartEvent):
                loader.get_event()
                yield from map(self._item, self._until(yaml.SequenceEndEvent))
            else:
                yield self._item(loader.get_event())
            loader.get_event()
            if not loader.check_event(yaml.StreamEndEvent):
                yield _line(loader.peek_event()), ValueError("a second document; a job is one")
        finally:
            loader.dispose()

    def _until(self, end: type) -> Iterator[Any]:
        """The events that begin a value, up to one of this type."""
        while not self.loader.check_event(end):
            yield self.loader.get_event()
        self.loader.get_event()

    def _item(self, event: Any) -> tuple[int, Any]:
        self.problem = None
        value = self._value(event, 0)
        if self.problem is None:
            return _line(event), value
        line, text = self.problem
        return line, ValueError(text)

    def _refuse(self, event: Any, text: str) -> None:
        self.problem = self.problem or (_line(event), text)

    def _value(self, event: Any, depth: int) -> Any:
        """The value that begins with this event; what is wrong with it is refused, and read to its end."""
        if isinstance(event, self.yaml.AliasEvent):
            if event.anchor not in self.anchors:  # or not yet: in the value itself
                self._refuse(event, f"*{event.anchor[:40]} stands for nothing that is whole before it")
            return self.anchors.get(event.anchor)
        if depth == DEPTH:
            raise self.yaml.MarkedYAMLError(problem="nested too deeply for a job", problem_mark=event.start_mark)
        if isinstance(event, self.yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, self.yaml.SequenceStartEvent):
            value = [self._value(own, depth + 1) for own in self._until(self.yaml.SequenceEndEvent)]
        else:
            value = self._mapping(event, depth)
        if event.tag not in TAGS and not isinstance(event, self.yaml.ScalarEvent):
            self._refuse_tag(event)
        if event.anchor is not None:
            self.anchors[event.anchor] = value
        return value

    def _mapping(self, start: Any, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        for event in self._until(self.yaml.MappingEndEvent):
            key = self._value(event, depth + 1)
            if isinstance(event, self.yaml.ScalarEvent):
                key = event.value
            value = self._value(self.loader.get_event(), depth + 1)
            if not isinstance(key, str):
                self._refuse(event, "a key is no text")
            elif key in own:
                self._refuse(event, f"{brief(key)} is given twice")
            else:
                own[key] = value
        return self._merged(start, own.pop("<<", [])) | own

    def _merged(self, start: Any, value: Any) -> dict[str, Any]:
        """The keys of one mapping or several, of which the first counts most."""
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in mappings):
            self._refuse(start, "<< takes a mapping, or a list of mappings")
            return {}
        return {key: own for one in reversed(mappings) for key, own in one.items()}

    def _scalar(self, event: Any) -> Any:
        text, tag = event.value, event.tag
        if tag in (None, "!"):
            tag = self.loader.resolve(self.yaml.ScalarNode, text, event.implicit)
        match tag.removeprefix(TAG):
            case "str" | "timestamp" | "value" | "merge":
                return text
            case "null":
                return None
            case "bool" if text.lower() in BOOLS:
                return BOOLS[text.lower()]
            case "int" | "float" if ":" in text:  # 1:30 is a range of seeds, which YAML takes for a number to base 60
                return text
            case "int" | "float" as kind:
                return self._number(event, kind)
        self._refuse_tag(event)
        return None

    def _number(self, event: Any, kind: str) -> int | float | None:
        node = self.yaml.ScalarNode(TAG + kind, event.value)
        try:
            check_digits(event.value)
            return getattr(self.loader, f"construct_yaml_{kind}")(node)
        except (ValueError, IndexError):
            self._refuse(event, f"{brief(event.value)} is no number that a job has")
            return None

    def _refuse_tag(self, event: Any) -> None:
        self._refuse(
            event, f"{brief(event.tag.replace(TAG, '!!'))}: jobs have the values that JSON has, and no other tags"
        )


def _line(event: Any) -> int:
    return event.start_mark.line + 1
