"""How a Mamba2 layer of ours lies in llama.cpp's ``granitehybrid``, which asks for twice the hidden size inside.

llama.cpp asserts that the heads of a Mamba layer have 2·D channels together; ours have H·P, usually D. Two ways to fill
the rest leave every output as it is, and both are used:

- **copies**: each head's channels stand there ``r`` times, so x, z, y and the norm's mean are what they were, and
  ``out_proj`` reads the first copy only. B, C and Δ, which belong to a head and not to a channel, are not repeated.
- **zero heads** for what no whole number of copies fills: their rows are zero, so their state and output stay zero.

Zeros inside a head would not do: they would change the mean of its norm, and the norm's ε is one for the whole model.

Key/value heads are repeated for their query heads, for llama.cpp has as many B as C.
"""

from __future__ import annotations

from dataclasses import dataclass

from mambify.config import HybridConfig
from mambify.errors import UnsupportedError

#: state sizes that llama.cpp's CUDA kernel takes; with another one its CUDA build runs the scan on the CPU. (96 is left
#: out: only newer builds take it.)
CUDA_STATE_SIZES = (128, 256)


def needs_idle_block(config: HybridConfig) -> bool:
    """Whether a block that adds zero follows the last one: llama.cpp stops with an error at a hybrid without attention.

    Its attention has one key/value head, its weights are zeros.
    """
    return not config.attention_layers


@dataclass(frozen=True)
class MambaLayout:
    """One Mamba2 layer as ours and as llama.cpp has it.

    Attributes:
        hidden_size: D.
        num_heads: H, ours; as many groups of B and C, once key/value heads are repeated.
        num_kv_heads: G, ours.
        head_dim: P, ours.
        state_size: N, ours.
        conv_kernel: K.
        copies: r, how often a head's channels stand in the file.
        heads: in the file, zero heads included.
        state: N in the file; what lies beyond ours is zero.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    state_size: int
    conv_kernel: int
    copies: int
    heads: int
    state: int

    @property
    def inner(self) -> int:
        """Channels of all heads in the file: 2·D."""
        return self.heads * self.copies * self.head_dim

    @property
    def weights(self) -> tuple[int, int]:
        """Weights of a layer's two projections and its convolution: ours, and in the file."""
        ours = self._weights(self.num_heads * self.head_dim, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        return ours, self._weights(self.inner, None, self.heads, self.heads)

    @property
    def state_elements(self) -> tuple[int, int]:
        """Elements of the recurrent state of one sequence, the convolution's window aside: ours, and in the file."""
        return self.num_heads * self.head_dim * self.state_size, self.inner * self.state

    @property
    def operations(self) -> tuple[int, int]:
        """Multiplications and additions that a layer takes for one token, roughly: ours, and in the file.

        Two a weight, and five an element of the state: decay, write and read.
        """
        (our_weights, weights), (our_state, state) = self.weights, self.state_elements
        return 2 * our_weights + 5 * our_state, 2 * weights + 5 * state

    def _weights(self, inner: int, kv_heads: int | None, groups_of_B: int, heads: int) -> int:
        state = self.state if kv_heads is None else self.state_size
        x = inner if kv_heads is None else kv_heads * self.head_dim
        conv = x + groups_of_B * state + heads * state
        return self.hidden_size * (inner + conv + heads) + self.conv_kernel * conv + inner * self.hidden_size


def mamba_layout(config: HybridConfig, *, pad_state: bool = False) -> MambaLayout:
    """Fits the Mamba2 layers of ``config`` into 2·D channels.

    Args:
        pad_state: fill the state up to the next size that llama.cpp's CUDA kernel takes.

    Raises:
        UnsupportedError: the heads are wider than 2·D together, or do not divide it, or the state is too large.
    """
    assert config.head_dim and config.num_key_value_heads
    D, H, P = config.hidden_size, config.num_attention_heads, config.head_dim
    if H * P > 2 * D:
        raise UnsupportedError(
            f"{H} heads of {P} are {H * P} channels, and llama.cpp's Mamba2 layers have {2 * D}, twice the hidden "
            "size: export it with --format transformers instead"
        )
    if 2 * D % P:
        raise UnsupportedError(
            f"heads of {P} do not divide {2 * D}, twice the hidden size, which llama.cpp gives a Mamba2 layer: "
            "export it with --format transformers instead"
        )
    copies = next(r for r in range(2 * D // (H * P), 0, -1) if 2 * D % (r * P) == 0)
    state = P
    if pad_state:
        larger = [size for size in CUDA_STATE_SIZES if size >= P]
        if not larger:
            raise UnsupportedError(
                f"a state of {P} is larger than llama.cpp's CUDA kernel takes ({CUDA_STATE_SIZES[-1]}): "
                "leave out --pad-state"
            )
        state = larger[0]
    return MambaLayout(
        hidden_size=D,
        num_heads=H,
        num_kv_heads=config.num_key_value_heads,
        head_dim=P,
        state_size=P,
        conv_kernel=config.conv_kernel,
        copies=copies,
        heads=2 * D // (copies * P),
        state=state,
    )
