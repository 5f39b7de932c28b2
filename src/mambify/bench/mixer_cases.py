"""Cases of the operations inside Mamba mixers: scans and convolutions over a sequence and a token at a time, the norm.

Letters: B batch, T tokens, H query heads, G key/value heads, P head dimension (= N, the state size of Mamba2), C conv
channels, K conv width, J sub-heads of M channels (Mamba1).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from transformers.models.mamba.modeling_mamba import mamba_selective_scan, mamba_selective_state_update
from transformers.models.mamba2.modeling_mamba2 import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from mambify.bench.case import Case, Inputs, Random, Shape
from mambify.bench.peers import peer
from mambify.ops.causal_conv import causal_conv, causal_conv_step
from mambify.ops.gated_norm import gated_rms_norm
from mambify.ops.selective_scan import selective_scan, selective_scan_step
from mambify.ops.ssd import ssd_scan, ssd_step

_K, _SUBHEAD, _EPS = 4, 16, 1e-5


def _ssd(s: Shape, random: Random) -> Case:
    inputs = {
        "x": random(s.B, s.T, s.G, s.P),
        "dt": F.softplus(random(s.B, s.T, s.H).float() - 2),
        "A": -random(s.H).float().abs() - 1,
        "B": random(s.B, s.T, s.G, s.P) / s.P**0.5,
        "C": random(s.B, s.T, s.H, s.P),
        "D": random(s.H).float(),
    }

    def repeated(i: Inputs) -> tuple[Tensor, Tensor]:
        if s.H == s.G:
            return i["x"], i["B"]
        return i["x"].repeat_interleave(s.H // s.G, dim=2), i["B"].repeat_interleave(s.H // s.G, dim=2)

    def ours(i: Inputs, backend: str) -> Tensor:
        return ssd_scan(i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], backend=backend)[0]

    def stock(i: Inputs) -> Tensor:
        x, B = repeated(i)
        y: Tensor = mamba2_chunk_scan(x, i["dt"], i["A"], B, i["C"], chunk_size=64, D=i["D"])
        return y

    def fla(i: Inputs) -> Tensor:
        scan = peer("fla.ops.simple_gla", "chunk_simple_gla")
        x, B = repeated(i)
        step = i["dt"][..., None].to(x.dtype) * x
        y: Tensor = scan(i["C"], B, step, i["dt"] * i["A"], scale=1.0)[0]
        return y + i["D"][:, None].to(x.dtype) * x

    def mamba_ssm(i: Inputs) -> Tensor:
        scan = peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        x, B = repeated(i)
        y: Tensor = scan(x, i["dt"], i["A"], B, i["C"], chunk_size=256, D=i["D"])
        return y

    peers = {"fla": fla, "mamba-ssm": mamba_ssm} if inputs["x"].is_cuda else {"transformers": stock}
    return Case("ssd_scan", f"B={s.B} T={s.T} H={s.H} G={s.G} P={s.P}", inputs, ours, peers)


def _ssd_step(s: Shape, random: Random) -> Case:
    inputs = {
        "x": random(s.B, s.G, s.P),
        "dt": F.softplus(random(s.B, s.H).float() - 2),
        "A": -random(s.H).float().abs() - 1,
        "B": random(s.B, s.G, s.P) / s.P**0.5,
        "C": random(s.B, s.H, s.P),
        "D": random(s.H).float(),
        "state": random(s.B, s.H, s.P, s.P).float(),
    }
    scratch = inputs["state"].clone()

    def ours(i: Inputs, backend: str) -> Tensor:
        return ssd_step(i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["state"], backend=backend)[0]

    def stock(i: Inputs) -> Tensor:
        scratch.copy_(i["state"])  # theirs writes the new state over the old one; ours returns it
        x, B = (i[name].repeat_interleave(s.H // s.G, dim=1) for name in ("x", "B"))
        dt, A, D = i["dt"][..., None].expand(-1, -1, s.P), i["A"][:, None, None], i["D"][:, None]
        y: Tensor = mamba2_selective_state_update(scratch, x, dt, A.expand(-1, s.P, s.P), B, i["C"], D.expand(-1, s.P))
        return y

    return Case("ssd_step", f"B={s.B} H={s.H} G={s.G} P={s.P}", inputs, ours, {"transformers": stock}, step=True)


def _selective(s: Shape, random: Random) -> Case:
    J, M = s.H * s.P // _SUBHEAD, _SUBHEAD
    T = s.T if random(1).is_cuda else s.T // 4  # the time of transformers' backward pass grows with the square of T
    inputs = {
        "x": random(s.B, T, J, M),
        "dt": F.softplus(random(s.B, T, J, M).float() - 2),
        "A": -random(M, M).float().abs() - 0.5,  # the same in all sub-heads: others take sub-heads as a batch
        "B": random(s.B, T, J, M),
        "C": random(s.B, T, J, M),
        "D": random(M).float(),
    }

    def ours(i: Inputs, backend: str) -> Tensor:
        A, D = i["A"].expand(J, M, M), i["D"].expand(J, M)
        return selective_scan(i["x"], i["dt"], A, i["B"], i["C"], D, backend=backend)[0]

    def stock(i: Inputs) -> Tensor:
        x, dt, B, C = (i[name].permute(0, 2, 3, 1).flatten(0, 1) for name in ("x", "dt", "B", "C"))
        y: Tensor = mamba_selective_scan(x, dt, i["A"], B, C, i["D"]).unflatten(0, (s.B, J)).permute(0, 3, 1, 2)
        return y

    def time_last(i: Inputs) -> Inputs:
        x, dt = (i[name].to(i["x"].dtype).permute(0, 2, 3, 1).flatten(1, 2).contiguous() for name in ("x", "dt"))
        B, C = (i[name].permute(0, 2, 3, 1).contiguous() for name in ("B", "C"))  # a group a sub-head
        return {"x": x, "dt": dt, "A": i["A"].repeat(J, 1), "B": B, "C": C, "D": i["D"].repeat(J)}

    def mamba_ssm(i: Inputs) -> Tensor:
        scan = peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
        y: Tensor = scan(i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"]).unflatten(1, (J, M))
        return y.permute(0, 3, 1, 2)

    name = f"B={s.B} T={T} J={J} M={M}"
    if not inputs["x"].is_cuda:
        return Case("selective_scan", name, inputs, ours, {"transformers": stock})
    return Case("selective_scan", name, inputs, ours, {"mamba-ssm": mamba_ssm}, layouts={"mamba-ssm": time_last})


def _selective_step(s: Shape, random: Random) -> Case:
    J, M = s.H * s.P // _SUBHEAD, _SUBHEAD
    inputs = {
        "x": random(s.B, J, M),
        "dt": F.softplus(random(s.B, J, M).float() - 2),
        "A": -random(M, M).float().abs() - 0.5,
        "B": random(s.B, J, M),
        "C": random(s.B, J, M),
        "D": random(M).float(),
        "state": random(s.B, J, M, M).float(),
    }
    scratch = inputs["state"].clone().flatten(0, 1)

    def ours(i: Inputs, backend: str) -> Tensor:
        A, D = i["A"].expand(J, M, M), i["D"].expand(J, M)
        return selective_scan_step(i["x"], i["dt"], A, i["B"], i["C"], D, i["state"], backend=backend)[0]

    def stock(i: Inputs) -> Tensor:
        scratch.copy_(i["state"].flatten(0, 1))
        x, dt, B, C = (i[name].flatten(0, 1) for name in ("x", "dt", "B", "C"))
        y: Tensor = mamba_selective_state_update(scratch, x, dt, i["A"], B, C, i["D"]).unflatten(0, (s.B, J))
        return y

    return Case("selective_scan_step", f"B={s.B} J={J} M={M}", inputs, ours, {"transformers": stock}, step=True)


def _conv(s: Shape, random: Random) -> Case:
    C = (2 * s.G + s.H) * s.P
    # As in a mixer: the channels are part of a wider projection.
    inputs = {"x": random(s.B, s.T, C + s.H * s.P)[..., s.H * s.P :], "weight": random(C, _K), "bias": random(C)}

    def ours(i: Inputs, backend: str) -> Tensor:
        return causal_conv(i["x"], i["weight"], i["bias"], backend=backend)[0]

    def stock(i: Inputs) -> Tensor:
        y: Tensor = causal_conv1d_fn(i["x"].transpose(1, 2), i["weight"], i["bias"], "silu").transpose(1, 2)
        return y

    def fla(i: Inputs) -> Tensor:
        y: Tensor = peer("fla.modules.causal_conv1d", "causal_conv1d")(
            i["x"], i["weight"], i["bias"], activation="silu"
        )[0]
        return y

    peers = {"transformers": stock} | ({"fla": fla} if inputs["x"].is_cuda else {})
    return Case("causal_conv", f"B={s.B} T={s.T} C={C} K={_K}", inputs, ours, peers)


def _conv_step(s: Shape, random: Random) -> Case:
    C = (2 * s.G + s.H) * s.P
    inputs = {"x": random(s.B, C), "weight": random(C, _K), "bias": random(C), "state": random(s.B, C, _K - 1)}
    scratch = inputs["state"].clone()

    def ours(i: Inputs, backend: str) -> Tensor:
        return causal_conv_step(i["x"], i["weight"], i["bias"], i["state"], backend=backend)[0]

    def stock(i: Inputs) -> Tensor:
        scratch.copy_(i["state"])
        y: Tensor = causal_conv1d_update(i["x"][..., None], scratch, i["weight"], i["bias"], "silu")[..., 0]
        return y

    return Case("causal_conv_step", f"B={s.B} C={C} K={_K}", inputs, ours, {"transformers": stock}, step=True)


def _norm(s: Shape, random: Random) -> Case:
    wide = random(s.B, s.T, 2 * s.H * s.P)[..., : s.H * s.P]
    inputs = {"y": random(s.B, s.T, s.H, s.P), "z": wide.unflatten(-1, (s.H, s.P)), "weight": random(s.H, s.P)}

    def ours(i: Inputs, backend: str) -> Tensor:
        return gated_rms_norm(i["y"], i["z"], i["weight"], _EPS, backend)

    def plain(i: Inputs) -> Tensor:
        gated = i["y"].float() * F.silu(i["z"].float())
        return F.rms_norm(gated, (s.P,), eps=_EPS).to(i["z"].dtype) * i["weight"]

    def mamba_ssm(i: Inputs) -> Tensor:
        norm = peer("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
        y, z = (i[name].flatten(2) for name in ("y", "z"))
        out: Tensor = norm(y, i["weight"].flatten(), None, z, _EPS, group_size=s.P, norm_before_gate=False)
        heads: Tensor = out.unflatten(-1, (s.H, s.P))
        return heads

    peers = {"torch": plain} | ({"mamba-ssm": mamba_ssm} if inputs["y"].is_cuda else {})
    return Case("gated_rms_norm", f"B={s.B} T={s.T} H={s.H} P={s.P}", inputs, ours, peers)


MIXER_MAKERS: dict[str, Callable[[Shape, Random], Case]] = {
    "ssd_scan": _ssd,
    "ssd_step": _ssd_step,
    "selective_scan": _selective,
    "selective_scan_step": _selective_step,
    "causal_conv": _conv,
    "causal_conv_step": _conv_step,
    "gated_rms_norm": _norm,
}
