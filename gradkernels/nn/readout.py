"""Attention over the outputs of a recurrent layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradkernels.ops._recurrent_checks import check_lengths

KINDS = ("dot", "general", "additive")


class AttentionReadout(nn.Module):
    r"""Reads a sequence of states by their likeness to a query: gradients reach every state in one step, however long ago it was.

    .. math::
        \text{weights}_t = \frac{e^{s_t}}{\sum_u e^{s_u}}, \qquad \text{context} = \sum_t \text{weights}_t \, k_t, \qquad
        s_t = \begin{cases} q \cdot k_t & \text{dot} \\ q^\top W k_t & \text{general} \\
        v \cdot \tanh(W_q q + W_k k_t) & \text{additive} \end{cases}

    over the first ``lengths[b]`` keys of sequence b. Where that is none, context and weights are zero.

    Args:
        query_dim, key_dim: width of a query and of a key; the same for "dot".
        kind: "dot" and "general" (Luong, Pham and Manning, 2015) or "additive" (Bahdanau, Cho and Bengio, 2015).
        hidden_dim: of the additive kind, rows of :math:`W_q`; key_dim when None.
        batch_first: keys, and queries of several steps, have the batch first; recurrent layers have it second unless told.

    Shapes: keys ``[T, B, key_dim]``; query ``[B, query_dim]``, one each, as a final state is, or ``[L, B, query_dim]``; lengths
    int64 ``[B]``, each 0 to T. Returns context ``[B, key_dim]`` or ``[L, B, key_dim]`` and weights ``[B, T]`` or ``[B, L, T]``. The
    additive kind makes ``[B, L, T, hidden_dim]`` on the way.

    Raises:
        ValueError: an unknown kind, "dot" of different widths, a width below 1, hidden_dim for another kind.
        RuntimeError: shapes do not fit together, or lengths are not between 0 and T.
        TypeError: lengths are not int64.

    Example:
        >>> import torch, gradkernels as gk
        >>> lengths = torch.tensor([7, 2, 4])
        >>> states, h = gk.nn.GRU(5, 8)(torch.randn(7, 3, 5), lengths=lengths)
        >>> context, weights = gk.nn.AttentionReadout(8, 8, kind="additive")(h[-1], states, lengths)
        >>> context.shape, weights.shape, bool((weights[1, 2:] == 0).all())
        (torch.Size([3, 8]), torch.Size([3, 7]), True)
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        kind: str = "dot",
        hidden_dim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "dot" and query_dim != key_dim:
            raise ValueError(f"query_dim and key_dim must be the same for kind 'dot', got {query_dim} and {key_dim}")
        if hidden_dim is not None and kind != "additive":
            raise ValueError(f"hidden_dim is of kind 'additive', not of {kind!r}")
        hidden = key_dim if hidden_dim is None else hidden_dim
        for name, n in (("query_dim", query_dim), ("key_dim", key_dim), ("hidden_dim", hidden)):
            if n < 1:
                raise ValueError(f"{name} must be at least 1, got {n}")
        self.query_dim, self.key_dim, self.kind, self.batch_first = query_dim, key_dim, kind, batch_first
        where = {"device": device, "dtype": dtype}
        if kind == "general":
            self.query = nn.Linear(query_dim, key_dim, bias=False, **where)
        elif kind == "additive":
            self.query = nn.Linear(query_dim, hidden, **where)
            self.key = nn.Linear(key_dim, hidden, bias=False, **where)
            self.score = nn.Linear(hidden, 1, bias=False, **where)

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, kind={self.kind!r}{', batch_first=True' * self.batch_first}"

    def forward(self, query: Tensor, keys: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        single = query.dim() == 2
        if keys.dim() == 3 and not self.batch_first:
            keys, query = keys.transpose(0, 1), query if single else query.transpose(0, 1)
        queries = query.unsqueeze(1) if single else query
        self._check(queries, keys, lengths)
        scores = self._scores(queries, keys)  # [B, L, T]
        if lengths is None:
            weights = scores.softmax(-1)
        else:
            lengths = lengths.to(keys.device)[:, None, None]
            hidden = torch.arange(keys.shape[1], device=keys.device) >= lengths
            # nothing but -inf would make NaN, here and in the gradient: of no key at all the scores are left
            weights = scores.masked_fill(hidden & (lengths > 0), -torch.inf).softmax(-1).masked_fill(lengths == 0, 0.0)
        context = weights.to(keys.dtype) @ keys
        if single:
            return context.squeeze(1), weights.squeeze(1)
        return context if self.batch_first else context.transpose(0, 1), weights

    def _scores(self, queries, keys):
        if self.kind == "additive":
            return self.score(torch.tanh(self.query(queries).unsqueeze(2) + self.key(keys).unsqueeze(1))).squeeze(-1)
        return (self.query(queries) if self.kind == "general" else queries) @ keys.mT

    def _check(self, queries, keys, lengths):
        """Of queries [B, L, .] and keys [B, T, .]."""
        if queries.dim() != 3 or keys.dim() != 3 or queries.shape[0] != keys.shape[0]:
            raise RuntimeError(
                f"query must be [B, {self.query_dim}] or of three dimensions, and keys of three, with the same B, "
                f"got {list(queries.shape)} and {list(keys.shape)} with the batch first"
            )
        for name, v, wide in (("query", queries, self.query_dim), ("keys", keys, self.key_dim)):
            if v.shape[2] != wide:
                raise RuntimeError(f"{name} must have {wide} features, got {list(v.shape)}")
        if lengths is None:
            return
        if lengths.dtype != torch.int64:
            raise TypeError(f"lengths must be int64, got {lengths.dtype}")
        if lengths.shape != keys.shape[:1]:
            raise RuntimeError(
                f"lengths must be [{keys.shape[0]}] beside keys {list(keys.shape)}, got {list(lengths.shape)}"
            )
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():  # those on a GPU are not read
            check_lengths(lengths, keys.shape[1])
