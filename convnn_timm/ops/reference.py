"""The definitions: naive, short, any device and floating dtype. What every other path is tested against.

B images, T tokens, Q queries, M candidates, C channels, O output channels, K neighbours. Tokens are channels-last rows.
"""
from typing import Optional, Tuple

import torch


def inverse_norm(x: torch.Tensor) -> torch.Tensor:
    """1 / |x| of every row, (..., 1), and 0 for a row of zeros: its similarity to all is 0, without gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    return (norm > 1e-12) / norm.clamp_min(1e-12)


def knn(
        query: torch.Tensor,
        candidates: torch.Tensor,
        k: int,
        metric: str = 'cosine',
        exclude: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Select the k nearest candidates of every query, nearest first; equal scores go to the lower candidate index.

    Args:
        query: (B, Q, C).
        candidates: (B, M, C).
        k: Number of neighbours, at most M.
        metric: 'cosine' (score is the cosine similarity) or 'euclidean' (score is the negative squared distance).
        exclude: (Q,) the candidate that a query must not select, or -1; it comes last if there are no others.

    Returns:
        index (B, Q, k) int64 and score (B, Q, k); gradient flows through the score only.
    """
    if metric == 'cosine':
        score = (query * inverse_norm(query)) @ (candidates * inverse_norm(candidates)).mT
    else:
        score = -(query.unsqueeze(2) - candidates.unsqueeze(1)).square().sum(-1)
    index = score.detach().sort(dim=-1, descending=True, stable=True).indices
    if exclude is not None:  # behind the others
        excluded = index == exclude.unsqueeze(1)
        index = index.gather(-1, excluded.byte().sort(dim=-1, stable=True).indices)
    index = index[..., :k]
    return index, score.gather(-1, index)


def grid_neighbors(size: Tuple[int, ...], k: int, device: Optional[torch.device] = None) -> torch.Tensor:
    """Select the k nearest positions of every position of a grid; equal distances go to the lower index.

    Args:
        size: Length of each axis, (T,) or (H, W).
        k: Number of neighbours, the position itself included.

    Returns:
        (T, k) int64 raster indices, ascending.
    """
    axes = torch.meshgrid(*[torch.arange(n, device=device) for n in size], indexing='ij')
    position = torch.stack([a.flatten() for a in axes], dim=1)
    distance = (position.unsqueeze(1) - position.unsqueeze(0)).square().sum(-1)
    return distance.sort(dim=1, stable=True).indices[:, :k].sort(dim=1).values


def neighbor_conv(
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        score: Optional[torch.Tensor] = None,
        groups: int = 1,
) -> torch.Tensor:
    """Convolve over neighbours: `y[t, o] = bias[o] + sum_r sum_c weight[o, c, r] * score[t, r] * x[index[t, r], c]`.

    Args:
        x: (B, T, C) tokens.
        index: (B, Q, K) int64, the neighbours of every query in rank order.
        weight: (O, C / groups, K), one matrix per neighbour rank.
        bias: (O,).
        score: (B, Q, K), a factor for every neighbour.
        groups: Blocks of channels that do not see each other, as in a convolution.

    Returns:
        (B, Q, O).
    """
    gathered = x[torch.arange(x.shape[0], device=x.device)[:, None, None], index]  # B, Q, K, C
    if score is not None:
        gathered = gathered * score.unsqueeze(-1)
    # (Not unflatten: torch's TorchScript exporter to ONNX makes the batch that it sees there a constant.)
    gathered = gathered.reshape(*index.shape, groups, x.shape[2] // groups)
    y = torch.einsum('bqkgc,gock->bqgo', gathered, weight.unflatten(0, (groups, -1))).flatten(2)
    return y if bias is None else y + bias
