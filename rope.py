"""Rotary positions: where every token of a video and of its references sits, as data.

Positions are an int64 tensor [L, 3] of (t, h, w); the network never branches on them. To try another layout
of the references, write one function like _jump and add it to LAYOUTS, and every script takes it. It returns
the (t, h, w) that is added to each token of one reference or of one missing view's proxies.

T H W  token grid of the video        h w  token grid of one reference
k      identity, from 0               v    view slot, index into VIEWS
r      how many references and groups of proxies come before this one
"""
import torch

# as the viewer sees them: in "left" the subject looks to the picture's left edge
VIEWS = ("front", "left", "right", "back")
RD_GAP = 1  # Mv2ID's temporal offset o; the paper gives no number


def _jump(k, v, r, T, H, W, jump):
    """Jump-RoPE (HarmoView): identity k owns the times from T + jump*(k+1); a dropped view moves nobody."""
    if jump < len(VIEWS):
        raise ValueError(f"rope jump {jump} is smaller than {len(VIEWS)} views: identities would overlap")
    return T + jump * (k + 1) + v, 0, 0


def _rd(k, v, r, T, H, W, jump):
    """RD-RoPE (Mv2ID): one shared time, each reference one whole frame further down and right."""
    return T + RD_GAP, (r + 1) * H, (r + 1) * W


def _append(k, v, r, T, H, W, jump):
    """As in Phantom: references are further frames of the video."""
    return T + r, 0, 0


def _before(k, v, r, T, H, W, jump):
    """As RD-RoPE, at a time before the video (DomainShuttle): 0.17 dB better than Jump-RoPE on the toy."""
    return -1, (r + 1) * H, (r + 1) * W


LAYOUTS = {"jump": _jump, "rd": _rd, "append": _append, "before": _before}


def video_positions(T, H, W):
    """int64 [T*H*W, 3], t slowest: the positions of the video's own tokens."""
    return torch.cartesian_prod(torch.arange(T), torch.arange(H), torch.arange(W)).reshape(-1, 3)


def check_layout(layout, jump):
    """ValueError for an unknown layout, or a jump that would let two identities overlap."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown rope layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    LAYOUTS[layout](0, 0, 0, 1, 1, 1, jump)  # a trial: it raises where the jump does not fit


def reference_positions(layout, views_given, T, H, W, ref_hw, proxy_tokens, jump=16):
    """int64 [L, 3]: the positions of all reference tokens, identity by identity, slot by slot in VIEWS order.

    layout        a key of LAYOUTS
    views_given   the views given of each identity, e.g. [("front", "left"), ("front",)]
    ref_hw        token grid (h, w) of each reference; a view that is given has h*w tokens
    proxy_tokens  tokens that stand for a missing view, all at the centre of its slot; 0 leaves the slot out
    Raises ValueError for an unknown view, and where check_layout does.
    """
    check_layout(layout, jump)
    unknown = sorted(set().union(*views_given) - set(VIEWS))
    if unknown:
        raise ValueError(f"unknown view {unknown[0]!r}; expected one of {', '.join(VIEWS)}")
    h, w = ref_hw
    grid = video_positions(1, h, w)
    proxies = torch.tensor([[0, h // 2, w // 2]]).expand(proxy_tokens, 3)
    blocks = []
    for k, views in enumerate(views_given):
        for v, view in enumerate(VIEWS):
            slot = grid if view in views else proxies
            if len(slot):
                blocks.append(slot + torch.tensor(LAYOUTS[layout](k, v, len(blocks), T, H, W, jump)))
    return torch.cat(blocks) if blocks else torch.zeros(0, 3, dtype=torch.int64)


def axis_pairs(head_dim):
    """How many of the head_dim/2 pairs rotate with t, h and w: Wan's split, (22, 21, 21) for 128."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def rope_table(positions, head_dim, theta=1e4):
    """positions [L, 3] -> cos, sin float32 [L, head_dim // 2]; angles in float64, as Wan computes them."""
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary needs pairs")
    angles_by_axis = []
    for axis, pairs in enumerate(axis_pairs(head_dim)):
        exponent = torch.arange(pairs, dtype=torch.float64, device=positions.device) / max(pairs, 1)
        angles_by_axis.append(positions[:, axis, None].double() * theta**-exponent)
    angles = torch.cat(angles_by_axis, dim=1)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x, cos, sin):
    """Rotate adjacent pairs (2i, 2i+1) of x [B, L, N, K] by the angles of cos, sin [L, K // 2]; same shape
    and dtype. In complex numbers: on a CPU 4.5 times faster than even and odd halves."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(dtype).unflatten(-1, (-1, 2)))  # [B, L, N, K/2]
    rotated = pairs * torch.complex(cos, sin).to(pairs.dtype)[:, None]
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)
