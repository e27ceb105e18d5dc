"""What holds on eight devices, in the process that `test_devices` starts: python eight_devices.py FOLDER

FOLDER: of a tiny pipeline like SD 1.
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import sdjax
from sdjax import sampling
from sdjax.plan.counts import COLLECTIVE
from sdjax.runtime import parallel, programs
from sdjax.runtime.denoiser import Denoiser
from sdjax.runtime.network import Network
from sdjax.sampling import loop
from sdjax.sampling.noise import seed_keys

SIZE = {"height": 16, "width": 16}


def load(folder, mesh):
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(folder, mesh=mesh)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def a_seed_is_an_image(folder):
    """On one device and on eight, in a batch of 5 and at another position; with a sampler that adds noise."""
    call = {**SIZE, "num_inference_steps": 4, "scheduler": "euler_ancestral", "output_type": "np"}
    alone = load(folder, parallel.data_mesh(jax.devices()[:1]))("goose", seed=7, **call).images[0]
    on_eight = load(folder, parallel.data_mesh())
    for seeds in (range(5, 10), [7, 1, 2, 3, 4]):
        images = on_eight("goose", seed=seeds, num_images_per_prompt=5, **call).images
        np.testing.assert_allclose(images[list(seeds).index(7)], alone, atol=1 / 255)
        assert np.abs(images[0] - images[1]).max() > 0.05


def initial_noise_is_identical_on_any_number(folder):
    keys = seed_keys(list(range(8)))
    noise = [
        np.asarray(programs.noise(mesh, parallel.split(keys, mesh), np.uint32(0), (2, 2, 4)))
        for mesh in (parallel.data_mesh(jax.devices()[:n]) for n in (1, 2, 8))
    ]
    assert np.array_equal(noise[0], noise[1])
    assert np.array_equal(noise[0], noise[2])


def split_parameters_give_the_same_picture(folder):
    """Kernels of the UNet are split by rules over a second axis, a quarter on each device; the first rule counts."""
    rules = [("time_emb", PartitionSpec()), (r"conv\d\.weight$", PartitionSpec(None, None, None, "fsdp"))]
    pipe = load(folder, Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp")))
    call = {**SIZE, "seed": range(8), "num_inference_steps": 2, "output_type": "np"}
    expected, own = pipe("goose", **call).images, pipe.network
    split = Network(pipe.unet, pipe.mesh, rules)
    pipe.network = lambda name: (split.graph, split.params()) if name == "unet" else own(name)
    assert np.array_equal(pipe("goose", **call).images, expected)
    shares = {name: leaf.addressable_shards[0].data.size / leaf.size for name, leaf in split.params().items()}
    assert shares["mid_block.resnets.0.conv1.weight"] == 1 / 4
    assert shares["time_embedding.linear_1.weight"] == shares["conv_in.weight"] == 1


def the_program_has_no_collective(folder):
    pipe = load(folder, parallel.data_mesh())
    unet = Network(pipe.unet, pipe.mesh)
    x, context = (parallel.split(np.ones((8, *shape), np.float32), pipe.mesh) for shape in ((4, 4, 4), (77, 24)))
    ones = parallel.split(np.ones(8, np.float32), pipe.mesh)
    state = programs.start(pipe.mesh, (x,), ones[:, None])
    table = sampling.Table.stack([pipe.scheduler.table(4)] * 8)
    segment = next(loop.segments(table, programs.SEGMENT_ROWS, programs.SEGMENT_ROWS)).rows
    keys = parallel.split(seed_keys(list(range(8))), pipe.mesh)
    lowered = programs.denoise_segment.lower(
        pipe.mesh,
        Denoiser(unet.graph, ()),
        [unet.params()],
        state,
        x,
        segment,
        keys,
        ({"encoder_hidden_states": context},) * 2,
        (parallel.split(np.ones((8, 2), np.float32), pipe.mesh), ones),
    )
    text = lowered.compile().as_text()
    assert "convolution" in text
    assert not COLLECTIVE.findall(text)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    a_seed_is_an_image(sys.argv[1])
    initial_noise_is_identical_on_any_number(sys.argv[1])
    split_parameters_give_the_same_picture(sys.argv[1])
    the_program_has_no_collective(sys.argv[1])
    print("done")
