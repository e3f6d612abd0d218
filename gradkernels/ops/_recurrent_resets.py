"""Resets as the flags of a mask: what a token's states are multiplied with before the walk's next step reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_flags(
    reset: Tensor,  # bool [T, B], or [N] packed: begin anew before this step
    x: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    state: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Flags [N] in the dtype of x, 1 after a row's last step; and [B, 1], what the initial states are multiplied with.

    Raises:
        RuntimeError: reset has another shape or device than x has tokens.
        TypeError: reset is not bool.
    """
    lead = x.shape[:-1]
    if reset.dtype is not torch.bool:
        raise TypeError(f"reset must be bool, got {reset.dtype}")
    if reset.shape != lead:
        raise RuntimeError(f"reset must have shape {list(lead)} beside x {list(x.shape)}, got {list(reset.shape)}")
    if reset.device != x.device:
        raise RuntimeError(f"reset must be beside x on {x.device}, got {reset.device}")
    keep, place = (~reset).to(x.dtype), None
    if batch_sizes is not None:  # as a padded batch
        T, B = batch_sizes.shape[0], state[0].shape[0] if state is not None else int(batch_sizes[:1].sum())
        sizes = batch_sizes.to(x.device)
        t = torch.arange(T, device=x.device).repeat_interleave(sizes, output_size=lead[0])
        row = torch.arange(lead[0], device=x.device) - (sizes.cumsum(0) - sizes)[t]
        place = t, row
        keep = keep.new_ones(T, B).index_put(place, keep)
        live = torch.arange(B, device=x.device) < sizes.unsqueeze(1)
    else:
        T, B = lead
        live = None
        if lengths is not None:
            live = torch.arange(T, device=x.device).unsqueeze(1) < lengths.to(x.device)
    if live is not None:
        keep = torch.where(live, keep, 1)  # there is no step that could begin anew
    none = keep.new_ones(1, B)
    if reverse:
        following = torch.cat([none, keep])[:T]
        if live is None:
            first = keep[-1:] if T else none
        else:  # each row begins with its last step in time
            last = (live.sum(0) - 1).clamp(min=0)
            first = keep.gather(0, last.unsqueeze(0)) if T else none
    else:
        following, first = torch.cat([keep, none])[1:], keep[:1] if T else none
    return (following.flatten() if place is None else following[place]), first.reshape(B, 1)
