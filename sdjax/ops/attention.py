"""Scaled dot-product attention: one function, in the form that suits the platform."""

from jax import Array

from sdjax.ops import attention_cpu, attention_gpu, attention_tpu
from sdjax.ops.attention_plain import plain
from sdjax.ops.platform import by_platform

FORMS = {  # platform: the form, and whether it is for such q and k; plain elsewhere
    "cpu": (attention_cpu.in_blocks, attention_cpu.pays),
    "cuda": (attention_gpu.fused, attention_gpu.serves),
    "tpu": (attention_tpu.flash, attention_tpu.serves),
}


def attention(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
    """softmax(q k^T / sqrt(D)) v: [B Lq H D], [B Lk H D], [B Lk H D] -> [B Lq H D]

    Scores and softmax are float32 whatever the dtype of the inputs. causal: token i sees tokens 0 to i. The form is
    chosen when the program is lowered for a platform: each gives the same values without writing all scores to memory.
    """
    if causal:
        return plain(q, k, v, causal=True)
    forms = {platform: form for platform, (form, suits) in FORMS.items() if suits(q, k)}
    return by_platform(forms, plain, q, k, v)
