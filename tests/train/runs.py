"""What the trainer's tests read of a run."""
import torch


def printed_result(capsys):
    return capsys.readouterr().out.strip().splitlines()[-1]


def weights(folder):
    return torch.load(folder / 'last.pth.tar', weights_only=False)


def equal(a, b):
    """Equality of nested containers down to the last bit of the tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
