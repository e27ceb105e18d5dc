"""Job files and options become items: what is swept in which order, what has which id, what is refused and where."""

import builtins
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sdjax.batch.job import lora_digests, read
from sdjax.pictures.picture import Picture
from sdjax.request import FIELDS, Request
from sdjax.request.kinds import PAIR
from sdjax.request.values import MAX_PICTURES

GOOSE = {"prompt": "a goose"}


@pytest.fixture
def written(tmp_path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def lora(tmp_path) -> str:
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"any content")
    return str(path)


def problems(*args, **kwargs) -> list[str]:
    with pytest.raises(ValueError) as error:
        read(*args, **kwargs)
    return str(error.value).splitlines()


def test_a_line_is_the_product_of_its_lists_the_last_key_fastest():
    items = read([{"prompt": ["a", "b"], "guidance_scale": [1, 3.5], "seed": "4:6"}])
    expected = [Request(p, seed=s, guidance_scale=g) for p in "ab" for g in (1.0, 3.5) for s in (4, 5)]
    assert list(items) == expected
    assert [items[i] for i in range(8)] == expected
    assert items[-3:] == expected[-3:]
    assert list(items.lines[0].swept) == ["prompt", "guidance_scale", "seed"]


def test_the_order_of_the_keys_is_the_order_of_the_sweep():
    assert [i.seed for i in read([{"seed": [7, 8], "prompt": ["a", "b"]}])] == [7, 7, 8, 8]
    assert [i.seed for i in read([{"prompt": ["a", "b"], "seed": [7, 8]}])] == [7, 8, 7, 8]


def test_lines_follow_each_other():
    items = read([GOOSE | {"seed": "0:3"}, {"prompt": ["a", "b"]}, {"prompt": "c", "seed": [9, "1,4:6"]}])
    assert len(items) == 9
    assert [(i.prompt, i.seed) for i in items][3:] == [("a", 0), ("b", 0), ("c", 9), ("c", 1), ("c", 4), ("c", 5)]
    assert [items[i] for i in range(9)] == list(items)
    with pytest.raises(IndexError):
        items[9]


def test_options_fill_what_a_line_leaves_open_and_count_faster():
    lines = [GOOSE, {"prompt": "a duck", "num_inference_steps": 5}]
    items = read(lines, {"seed": "0:2", "num_inference_steps": [10, 20]})
    assert [(i.seed, i.num_inference_steps) for i in items] == [(0, 10), (0, 20), (1, 10), (1, 20), (0, 5), (1, 5)]


def test_options_alone_and_a_file_of_prompts(written):
    assert list(read(None, GOOSE | {"seed": 3})) == [Request("a goose", seed=3)]
    prompts = written("prompts.txt", "# birds\na goose\n\n  a duck, [blurry]  \r\n")
    items = read(prompts=prompts, flags={"seed": "0:2"})
    assert [(i.prompt, i.seed) for i in items] == [
        ("a goose", 0), ("a goose", 1), ("a duck, [blurry]", 0), ("a duck, [blurry]", 1)
    ]  # fmt: skip


def test_a_range_of_seeds_takes_no_memory():
    items = read([GOOSE | {"seed": f"{2**64 - MAX_PICTURES}:{2**64}"}])
    assert len(items) == MAX_PICTURES
    assert items[-1].seed == 2**64 - 1


SAID = GOOSE | {"seed": "0:2", "scheduler": ["ddim", "euler"], "guidance_scale": 3, "height": 64, "noise": "torch"}
SAID |= {"guidance_interval": "1:30.5", "cache_interval": [None, 3], "vae_tiling": True}
FORMATS = {
    "jobs.jsonl": f"\n{json.dumps(SAID)}\n\n",
    "jobs.json": json.dumps(SAID),
    "jobs.csv": "prompt,seed,scheduler,guidance_scale,height,noise,"
    "guidance_interval,cache_interval,vae_tiling,negative_prompt\n\n"
    'a goose,0:2,"[""ddim"", ""euler""]",3,64,torch,1:30.5,"[null, 3]",true,\n',
    "jobs.yaml": "- prompt: a goose\n  seed: 0:2\n  scheduler: [ddim, euler]\n  guidance_scale: 3\n  height: 64\n"
    "  noise: torch\n  guidance_interval: 1:30.5\n  cache_interval: [null, 3]\n  vae_tiling: true\n",
    "one.yml": json.dumps(SAID),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(written, name):
    assert list(read(written(name, FORMATS[name]))) == list(read([SAID]))


def test_a_byte_order_mark_is_no_part_of_the_first_column(written):
    assert list(read(written("jobs.csv", "\ufeffprompt\na goose\n"))) == [Request("a goose")]


def test_a_cell_of_csv_is_a_text_or_a_list_of_texts_for_prompts_and_json_else(written):
    path = written("jobs.csv", 'prompt,seed\n[blurry],"[1, ""3:5""]"\n"a\nb, c","1,3:5"\n"[""x"", ""y""]",7\n1984,\n')
    assert [(i.prompt, i.seed) for i in read(path)] == [
        *(("[blurry]", seed) for seed in (1, 3, 4)),
        *(("a\nb, c", seed) for seed in (1, 3, 4)),
        ("x", 7),
        ("y", 7),
        ("1984", 0),
    ]


def test_yaml_does_not_count_to_base_60(written):
    assert [i.seed for i in read(written("jobs.yaml", "prompt: a goose\nseed: 10:12\n"))] == [10, 11]


def test_yaml_may_repeat_itself_by_reference(written):
    path = written("jobs.yaml", "- &first {prompt: a goose, seed: 1}\n- <<: *first\n  seed: 2\n")
    assert list(read(path)) == [Request("a goose", seed=1), Request("a goose", seed=2)]


def test_without_pyyaml_the_extra_is_named(written, monkeypatch):
    path, real = written("jobs.yaml", "prompt: a goose\n"), builtins.__import__

    def without(name, *args, **kwargs):
        if name == "yaml":
            raise ModuleNotFoundError("No module named 'yaml'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"PyYAML: pip install .*sdjax\[batch\]"):
        read(path)


def test_loras_are_a_set_and_a_list_sweeps(lora, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other content")
    items = read([GOOSE | {"loras": [None, f"{lora}:0.8", {lora: 1, str(other): -0.5}]}])
    assert [i.loras for i in items] == [(), ((lora, 0.8),), ((str(other), -0.5), (lora, 1.0))]
    assert items[2].settings()["loras"] == {str(other): -0.5, lora: 1.0}
    assert items[2] == read([GOOSE | {"loras": {str(other): -0.5, lora: 1}}])[0]
    digests = lora_digests(items)
    assert digests.keys() == {lora, str(other)}
    other.write_bytes(b"changed")
    assert lora_digests(items)[lora] == digests[lora]
    assert lora_digests(items)[str(other)] != digests[str(other)]


def test_an_interval_is_a_text_and_a_list_sweeps():
    items = read([GOOSE | {"guidance_interval": ["0.3:5", None, "0:inf"], "cache_interval": [None, 3]}])
    expected = [(i, c) for i in ((0.3, 5.0), None, (0.0, math.inf)) for c in (None, 3)]
    assert [(i.guidance_interval, i.cache_interval) for i in items] == expected


def test_a_list_of_timesteps_is_one_value(written):
    given = [(999.0, 499.0), (749.0,)]
    items = read([GOOSE | {"timesteps": [[999, 499], [749]]}])
    assert [(i.timesteps, i.num_inference_steps) for i in items] == [(given[0], 2), (given[1], 1)]
    assert list(read(written("jobs.csv", 'prompt,timesteps\na goose,"999,499"\n'))) == [items[0]]
    assert problems([GOOSE | {"timesteps": [999, 499], "num_inference_steps": [2, 3]}])[1:] == [
        "line 1: num_inference_steps is a list, and timesteps says how many there are"
    ]


@pytest.mark.parametrize("interval", [None, (0.1, 1 / 3), (0.0, math.inf)])
def test_the_settings_of_an_item_are_a_line_of_a_job(lora, interval):
    item = Request("a goose", seed=3, width=64, loras=((lora, 0.5),), guidance_interval=interval, vae_tiling=True)
    assert list(read([json.loads(json.dumps(item.settings()))])) == [item]


def test_an_id_is_the_same_in_every_process_and_version():
    assert Request("a goose", seed=2**64 - 1).id("model") == "3c182d6f27e9df0a6456"


OTHER = {
    "prompt": "a Goose",
    "negative_prompt": "",
    "seed": 1,
    "scheduler": "ddim",
    "num_inference_steps": 49,
    "guidance_scale": 7.5,
    "width": 512,
    "height": 512,
    "clip_skip": 0,
    "noise": "cuda",
    "prompt_syntax": "plain",
    "loras": (("a.safetensors", 1.0),),
    "control_image": (Picture("ab" * 32, (8, 8)),),
    "control_mode": (3,),
    "controlnet_conditioning_scale": (0.5,),
    "control_guidance_start": (0.5,),
    "control_guidance_end": (0.5,),
    "guess_mode": True,
    "depth_map": Picture("cd" * 32, (8, 8)),
    "pag_scale": 3.0,
    "pag_applied_layers": ("up",),
    "freeu": (0.9, 0.2, 1.5, 1.6),
    "hires_scale": 2.0,
    "hires_strength": 0.5,
    "hires_upscaler": "model",
    "padding_mask_crop": 8,
    "control_preprocessor": ("canny",),
    "ip_adapter_image": ((Picture("ab" * 32, (8, 8)),),),
    "ip_adapter_mask": ((Picture("ab" * 32, (8, 8)),),),
    "ip_adapter_scale": (0.5,),
    "noise_level": 30,
    "image_guidance_scale": 1.5,
    "guidance_interval": (0.3, 5.0),
    "cache_interval": 1,
    "vae_tiling": True,
    "prompt_2": "",
    "negative_prompt_2": "",
    "timestep_spacing": "leading",
    "timesteps": (999.0, 499.0),
    "sigmas": (14.6, 0.0),
    "guidance_rescale": 0.5,
    "cfg_plus_plus": True,
    "perp_neg_scale": 1.0,
    "mimic_scale": 7.0,
    "threshold_percentile": 0.9,
    **{name: (8, 8) for name, spec in FIELDS.items() if spec.kind is PAIR},
    "aesthetic_score": 1.0,
    "negative_aesthetic_score": 1.0,
    "image": Picture("0" * 64, (8, 8)),
    "strength": 0.5,
    "mask_image": Picture("0" * 64, (8, 8)),
    "keep_unmasked": False,
    "soft_mask": True,
    "mask_blur": 4,
    "outpaint": (8, 0, 0, 0),
}


def test_learned_words_are_read_before_brackets(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a [x,AND]")
    for source, options in (
        ([{"prompt": "a [x,AND]"}], {}),
        ([{"prompt": "a goose", "negative_prompt": "[X,AND]"}], {}),
        (None, {"flags": {"prompt": "a [x,AND]"}}),
        (None, {"prompts": prompts}),
    ):
        assert len(read(source, words=["[x,AND]"], **options)) == 1
        with pytest.raises(ValueError, match="AND is not supported"):
            read(source, words=["<cat>"], **options)


def test_an_id_depends_on_every_field_and_on_the_model():
    item = Request("a goose")
    ids = [item.id("model"), item.id("another"), *(replace(item, **{name: OTHER[name]}).id("model") for name in FIELDS)]
    assert len({*ids}) == len(FIELDS) + 2
    assert all(len(id) == 20 and int(id, 16) >= 0 for id in ids)


def test_pictures_are_told_apart_by_their_content():
    items = [
        replace(Request("a"), image=Picture(sha, (8, 8), path)) for sha, path in (("0", "a"), ("0", "b"), ("1", "a"))
    ]
    assert [item.id("") == items[0].id("") for item in items] == [True, True, False]


def test_whole_and_decimal_guidance_are_one_item():
    assert read([GOOSE | {"guidance_scale": 3}])[0].id("") == read([GOOSE | {"guidance_scale": 3.0}])[0].id("")


BAD = {
    "prompt": [None, 5, True, [[]], "a,AND b", "<lora:x:1>"],
    "negative_prompt": [5, {}],
    "seed": [
        -1,
        2**64,
        1.5,
        True,
        None,
        "",
        "a",
        "5:5",
        "5:3",
        "1,,2",
        "0:18446744073709551617",
        "0:18446744073709551616",
        f"0:{MAX_PICTURES + 1}",
    ],
    "scheduler": ["dim", 5, {}],
    "num_inference_steps": [0, "20", 2.5, None, True],
    "guidance_scale": ["7", True, float("nan"), float("inf")],
    "width": [0, -8, "512"],
    "height": [1.5],
    "clip_skip": [-1, True],
    "timesteps": ["", "999,,1", [[True, "a"]], "nan"],
    "noise": ["numpy", None],
    "loras": [5, "missing.safetensors:1", {"missing.safetensors": 1}],
    "guidance_interval": [3, [5, 0.3], True, "", "5", "5:0.3", "5:5", "-1:5", "a:b", "0:nan", "1:2:3"],
    "cache_interval": [0, 2.5, "3", True],
    "vae_tiling": [None, 1, "yes"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_value_is_named_with_its_key_and_line(key, value):
    _, *found = problems([GOOSE, GOOSE | {"seed": 1} | {key: value}])
    assert len(found) == 1
    assert found[0].startswith("line 2: ")
    assert key in found[0] or "sampler" in found[0]


def test_the_weight_of_a_lora_is_checked(lora):
    assert "weight" in problems([GOOSE | {"loras": {lora: "strong"}}])[1]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("promt", "prompt"),
        ("seeds", "seed"),
        ("steps", "num_inference_steps"),
        ("size", "width"),
        ("zzz", "known are"),
    ],
)
def test_an_unknown_key_has_a_suggestion(key, hint):
    (found,) = problems([GOOSE | {key: 1}])[1:]
    assert found.startswith(f"line 1: unknown: {key!r}")
    assert hint in found.partition(";")[2]


MANY = {
    "jobs.jsonl": (
        '{"prompt": "a", "seed": -1, "stepz": 3}\n\n{"prompt": "b"}\n{"prompt": \n[1]\n{"seed": 3}\n'
        '{"seed": 1, "seed": 2}\n',
        [1, 1, 4, 5, 6, 7],
    ),
    "jobs.csv": ('prompt,seed\n"a\nb",-1\nc,1\nd,2,3\n,4\ne,x\n', [2, 5, 6, 7]),
    "header.csv": ("prompt,sedd\na,1\nb,2\n", [1]),
    "twice.csv": ("prompt,prompt\na,b\n", [1]),
    "quotes.csv": ('prompt\na\n"b" c\n', [3]),
    "jobs.yaml": ("- prompt: a\n  seed: -1\n- 5\n- prompt: b\n- seed: 2\n- prompt: c\n  prompt: d\n", [1, 3, 5, 7]),
    "broken.yaml": ("- prompt: a\n- prompt: @b\n- c\n", [2]),
    "unsafe.yaml": ("- prompt: a\n- prompt: !!python/name:os.system\n", [2]),
    "prompts.txt": ("a\n[a:b,AND:0.5]\n# c\na\n<lora:x:1>\n", [2, 4, 5]),
}


HOSTILE = {
    "deep.jsonl": (b"[" * 10**6, "line 1: not a job: nested too deeply"),
    "deep value.jsonl": (b'{"prompt": "a", "loras": ' + b"[" * 900 + b"]" * 900 + b"}", "line 1: loras must be"),
    "digits.jsonl": (b'{"prompt": "a", "seed": ' + b"9" * 10**5 + b"}", "line 1: a number of 100,000 digits"),
    "many digits.jsonl": (
        b'{"prompt": "a", "guidance_interval": [1, ' + b"9" * 399 + b"]}",
        "line 1: guidance_interval",
    ),
    "infinity.jsonl": (b'{"prompt": "a", "guidance_scale": 1e999}', "line 1: guidance_scale must be a finite number"),
    "truth.jsonl": (b'{"prompt": "a", "timesteps": [true, 1]}', "line 1: timesteps must be numbers"),
    "unknown.jsonl": (b'{"prompt": "a", "sead": 1}\n' * 100_000, "1000 problems or more"),
    "all unknown.jsonl": (b"".join(b'{"z%d": 1}\n' % i for i in range(100_000)), "1000 problems or more"),
    "twice.jsonl": (
        json.dumps({f"k{i}": 1 for i in range(50_000)}).encode()[:-1] + b', "k9": 1}',
        "line 1: 'k9' is given",
    ),
    "within.jsonl": (b'{"prompt": "a", "loras": {"x": 1, "x": 2}}', "line 1: 'x' is given twice"),
    "half.jsonl": (b'{"prompt": "a\\ud800"}', "line 1: prompt must be text of whole characters"),
    "zeros.jsonl": (bytes(1000), "line 1: not JSON"),
    "latin.jsonl": (b'{"prompt": "a"}\n{"prompt": "\xe9"}', "line 2: not text in UTF-8"),
    "long.jsonl": (b'{"prompt": "' + b"a" * (17 << 20) + b'"}', "line 1 has more than 16 MiB"),
    "seeds.jsonl": (
        b"".join(b'{"prompt": "a%d", "seed": "0:6000000"}\n' % i for i in range(99)),
        "12,000,000 pictures, more",
    ),
    "deep.csv": (b'prompt,seed\na,"' + b"[" * 10**5 + b'"\n', "line 2: seed"),
    "columns.csv": (b",".join(b"c%d" % i for i in range(10**5)), "line 1: unknown column 'c0'"),
    "latin.csv": (b"prompt\n\xe9\n", "line 2: not text in UTF-8"),
    "quote.csv": (b'prompt\n"' + b"a\n" * 10**5, "line 2: field larger than field limit"),
    "deep.yaml": (b"[" * 10**5, "line 1: not YAML: "),
    "deep mappings.yaml": (b"{a: " * 10**5, "line 1: not YAML: nested too deeply"),
    "bomb.yaml": (
        b"- &a0 [x]\n" + b"".join(b"- &a%d [%s]\n" % (i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 30)),
        "line 20: not a mapping",
    ),
    "bomb of keys.yaml": (
        b"- &a0 {a: 1}\n"
        + b"".join(b"- &a%d {<<: [%s]}\n" % (i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 30)),
        "line 10: has no prompt",
    ),
    "itself.yaml": (b"- prompt: a\n- &a {prompt: *a}\n", "line 2: *a stands for nothing"),
    "tag.yaml": (b"- prompt: a\n- prompt:\n    !!set {b, c}\n", "line 3: '!!set'"),
    "object.yaml": (b"- !!python/object/apply:os.system [x]", "line 1: '!!python/object/apply:os.system'"),
    "empty number.yaml": (b"seed: !!int ''", "line 1: '' is no number"),
    "within.yaml": (b"- prompt: a\n  loras:\n    x: 1\n    x: 2\n", "line 4: 'x' is given twice"),
    "key.yaml": (b"- ? [a]\n  : 1\n", "line 1: a key is no text"),
    "two.yaml": (b"--- {prompt: a}\n--- {prompt: b}\n", "line 2: a second document"),
    "zero.yaml": (b"prompt: a\0", "not YAML: control characters"),
    "large.yaml": (b"prompt: " + b"a" * (9 << 20), "larger than 8 MiB"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_made_to_break(tmp_path, name):
    content, said = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        read(tmp_path / name)
    assert said in str(error.value) and str(tmp_path / name) in str(error.value)
    assert time.process_time() - start < 5 and len(str(error.value)) < 40_000


@pytest.mark.skipif(os.name == "nt", reason="devices are files of Unix")
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.yaml", "prompts"])
def test_files_without_an_end(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"line 1 has more than 16 MiB|larger than 8 MiB"):
        read(**{"prompts" if name == "prompts" else "source": tmp_path / name})


def test_values_of_yaml(written):
    text = (
        "- &d {prompt: &p [a, 2024-01-01], seed: 0x10, guidance_scale: 1.5}\n"
        "- <<: [*d, {width: 8}]\n  seed: ! '5'\n  vae_tiling: yes\n  negative_prompt: !!str 7\n"
        "- {prompt: *p, width: ~, seed: 1_0}\n"
    )
    first = {"prompt": ["a", "2024-01-01"], "seed": 16, "guidance_scale": 1.5}
    second = first | {"width": 8, "seed": 5, "vae_tiling": True, "negative_prompt": "7"}
    third = {"prompt": first["prompt"], "width": None, "seed": 10}
    assert {*read(written("a.yaml", text))} == {*read([first, second, third])}


@pytest.mark.parametrize("name", MANY)
def test_all_problems_are_listed_with_their_lines(written, name):
    text, numbers = MANY[name]
    path = written(name, text)
    first, *found = problems(**{"prompts" if name.endswith("txt") else "source": path})
    assert first == f"{path}: {len(numbers)} problem{'s' * (len(numbers) > 1)}, nothing was started:"
    assert [int(line.removeprefix("line ").partition(":")[0]) for line in found] == numbers


def test_of_a_thousand_problems_some_are_shown_and_all_counted():
    found = problems([GOOSE | {"seed": -1}] * 1000)
    assert "1000 problems" in found[0]
    assert len(found) == 22
    assert found[-1] == "… and 980 more"


def test_a_line_that_is_no_mapping_is_named():
    assert problems([GOOSE, 5])[1:] == ["line 2: not a mapping of keys to values: 5"]


def test_bad_options_are_named_once():
    found = problems([GOOSE, {"prompt": "b"}], {"num_inference_steps": 0})
    assert found[1:] == ["options: num_inference_steps must be a whole number, 1 or more, not 0"]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.csv", "prompt\n"), ("a.yaml", ""), ("a.txt", "a")])
def test_nothing_and_unknown_formats_are_refused(written, name, text):
    assert name in problems(written(name, text))[0]


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(b"\xff\xfe")
    assert "UTF-8" in problems(path)[0]


@pytest.mark.parametrize(
    "lines",
    [
        [GOOSE, {"prompt": "b"}, GOOSE | {"seed": 0}],
        [GOOSE | {"seed": "0:9"}, {"prompt": "b"}, {"seed": [20, 8], "prompt": ["c", "a goose"]}],
    ],
)
def test_no_picture_is_made_twice(lines):
    (found,) = problems(lines)[1:]
    assert found.startswith("line 3: makes the picture of line 1 again")


def test_no_value_is_swept_twice():
    assert problems([GOOSE | {"seed": "1,2,1"}])[1:] == ["line 1: seed has 1 twice"]
    assert problems([GOOSE | {"guidance_scale": [3, 3.0]}])[1:] == ["line 1: guidance_scale has 3.0 twice"]


def test_too_many_pictures_are_refused_at_once():
    sweep = {"seed": f"0:{MAX_PICTURES}", "num_inference_steps": list(range(1, 900)), "width": list(range(8, 900))}
    assert "pictures, more than" in problems([GOOSE | sweep] * 3)[1]


def test_a_job_and_a_file_of_prompts_exclude_each_other(written):
    path = written("a.txt", "a")
    with pytest.raises(ValueError, match="either"):
        read([GOOSE], prompts=path)
    with pytest.raises(ValueError, match="either"):
        read(flags=GOOSE, prompts=path)


def test_plain_prompts_of_a_job_are_text():
    """Whether the line or the flags give the syntax, or the prompt; a line that sweeps both is read as the web UI's."""
    odd, plain = {"prompt": "a goose,AND"}, {"prompt_syntax": "plain"}
    for source, flags in (([odd | plain], None), ([odd], plain), ([plain], odd | plain), (None, odd | plain)):
        assert [item.prompt_syntax for item in read(source, flags)] == ["plain"]
    for source, flags in (
        ([odd | {"prompt_syntax": "web-ui"}], plain),
        ([{"prompt_syntax": "web-ui"}], odd | plain),
        ([odd | {"prompt_syntax": ["plain", "web-ui"]}], None),
    ):
        with pytest.raises(ValueError, match="AND is not supported"):
            read(source, flags)
