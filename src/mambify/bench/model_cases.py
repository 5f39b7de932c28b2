"""Cases of the operations around the mixers: the sum and norm, rotations, the MLP's gate, losses by the head, draws.

Letters: B batch, T tokens, H heads, P head dimension, F intermediate size, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mambify.bench.case import Case, Inputs, Random, Shape
from mambify.bench.peers import peer
from mambify.ops.add_norm import add_norm
from mambify.ops.draw import draw_tokens
from mambify.ops.linear_kl import linear_kl
from mambify.ops.linear_logprob import linear_logprob
from mambify.ops.rope import rotate
from mambify.ops.swiglu import swiglu

_EPS = 1e-5


def _add_norm(s: Shape, random: Random) -> Case:
    inputs = {"stream": random(s.B, s.T, s.D), "x": random(s.B, s.T, s.D), "weight": random(s.D)}

    def ours(i: Inputs, backend: str) -> Tensor:
        normed, total = add_norm(i["stream"], i["x"], i["weight"], _EPS, backend=backend)
        return normed + total  # one output, by which both get a gradient

    def plain(i: Inputs) -> Tensor:
        total = i["stream"] + i["x"]
        return F.rms_norm(total, (s.D,), i["weight"], _EPS) + total

    def liger(i: Inputs) -> Tensor:
        norm = peer("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
        # Theirs writes a gradient over the one that comes in unless told not to.
        normed, total = norm(i["x"], i["stream"], i["weight"], _EPS, in_place=False)
        both: Tensor = normed + total
        return both

    peers = {"torch": plain} | ({"liger": liger} if inputs["x"].is_cuda else {})
    return Case("add_norm", f"B={s.B} T={s.T} D={s.D}", inputs, ours, peers)


def _swiglu(s: Shape, random: Random) -> Case:
    inputs = {"gate": random(s.B, s.T, s.F), "up": random(s.B, s.T, s.F)}

    def ours(i: Inputs, backend: str) -> Tensor:
        return swiglu(i["gate"], i["up"], backend=backend)

    def plain(i: Inputs) -> Tensor:
        return F.silu(i["gate"]) * i["up"]

    return Case("swiglu", f"B={s.B} T={s.T} F={s.F}", inputs, ours, {"torch": plain})


def _rope(s: Shape, random: Random) -> Case:
    angle = random(1, s.T, s.P // 2).float().repeat(1, 1, 2)
    cos, sin = angle.cos().to(random(1).dtype), angle.sin().to(random(1).dtype)
    inputs = {"x": random(s.B, s.T, s.H, s.P)}

    def ours(i: Inputs, backend: str) -> Tensor:
        return rotate(i["x"], cos.to(i["x"]), sin.to(i["x"]), backend=backend)

    def stock(i: Inputs) -> Tensor:
        y: Tensor = apply_rotary_pos_emb(i["x"], i["x"][:, :, :0], cos, sin, unsqueeze_dim=2)[0]
        return y

    return Case("rotate", f"B={s.B} T={s.T} H={s.H} P={s.P}", inputs, ours, {"transformers": stock})


def _kl(s: Shape, random: Random, *, reverse: bool = False) -> Case:
    M = min(s.B * s.T, 8192)
    head = random(s.V, s.D) / s.D**0.5
    teacher = random(M, s.D)
    inputs = {"student": teacher + 0.3 * random(M, s.D), "teacher": teacher, "head": head}
    labels = torch.zeros(M, dtype=torch.long, device=head.device)

    def ours(i: Inputs, backend: str) -> Tensor:
        given = (i["student"], i["head"], i["teacher"], i["head"], labels)
        parts = linear_kl(*given, kl_weight=not reverse, reverse_kl_weight=reverse, backend=backend)
        return parts.total / M

    def plain(i: Inputs) -> Tensor:
        log_p, log_q = ((i[name] @ i["head"].T).float().log_softmax(-1) for name in ("student", "teacher"))
        pair = (log_q, log_p) if reverse else (log_p, log_q)
        loss: Tensor = F.kl_div(*pair, log_target=True, reduction="batchmean")
        return loss

    def liger(i: Inputs) -> Tensor:
        divergence = peer("liger_kernel.transformers.functional", "liger_fused_linear_jsd")
        # Jensen-Shannon's limits: 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher).
        loss: Tensor = divergence(i["student"], i["head"], i["teacher"], i["head"], jsd_beta=float(reverse))
        return loss

    name = "linear_kl_reverse" if reverse else "linear_kl"
    peers = {"torch": plain} | ({"liger": liger} if head.is_cuda else {})
    return Case(name, f"M={M} D={s.D} V={s.V}", inputs, ours, peers, trained=("student",))


def _logprob(s: Shape, random: Random) -> Case:
    N = min(s.B * s.T, 8192)
    inputs = {"hidden": random(N, s.D), "head": random(s.V, s.D) / s.D**0.5}
    labels = torch.arange(N, device=inputs["head"].device) * 7 % s.V

    def ours(i: Inputs, backend: str) -> Tensor:
        return linear_logprob(i["hidden"], i["head"], labels, backend=backend).mean()

    def plain(i: Inputs) -> Tensor:
        return -F.cross_entropy((i["hidden"] @ i["head"].T).float(), labels)

    def liger(i: Inputs) -> Tensor:
        loss: Tensor = peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")(
            i["hidden"], i["head"], labels
        )
        return -loss

    shape = f"N={N} D={s.D} V={s.V}"
    if not inputs["head"].is_cuda:
        return Case("linear_logprob", shape, inputs, ours, {"torch": plain}, trained=("hidden",))
    peers = {"torch": plain, "liger": liger}
    return Case("linear_logprob", shape, inputs, ours, peers, trained=("hidden",), unrecorded=("liger",))


def _draw(s: Shape, random: Random) -> Case:
    rows = s.B * 64
    inputs = {"logits": 3 * random(rows, s.V), "uniform": torch.rand(rows, device=random(1).device)}

    def ours(i: Inputs, backend: str) -> Tensor:
        return draw_tokens(i["logits"], i["uniform"], top_k=50, backend=backend)

    def plain(i: Inputs) -> Tensor:
        values, indices = i["logits"].float().topk(50)
        return indices.gather(1, torch.multinomial(values.softmax(-1), 1))[:, 0]

    return Case("draw_tokens", f"S={rows} V={s.V} top_k=50", inputs, ours, {"torch": plain}, step=True, exact=True)


MODEL_MAKERS: dict[str, Callable[[Shape, Random], Case]] = {
    "add_norm": _add_norm,
    "swiglu": _swiglu,
    "rotate": _rope,
    "linear_kl": _kl,
    "linear_kl_reverse": partial(_kl, reverse=True),
    "linear_logprob": _logprob,
    "draw_tokens": _draw,
}
