"""The tokens that the tests of ops are run on."""
import torch


def tokens(*shape, dtype=torch.float64, seed=0, ties=False):
    """Random tokens; with ties: small integers, a quarter of them dead (exact in every dtype, many equal scores)."""
    generator = torch.Generator().manual_seed(seed)
    if not ties:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randint(-1, 2, shape, generator=generator)
    return (x * (torch.rand(shape[:-1], generator=generator) > 0.25).unsqueeze(-1)).to(dtype)
