"""What tests of ops share: small chunks, each way of the eager backend, and torch's precision settings."""
import pytest
import torch

from convnn_timm.ops import _common
from convnn_timm.ops.eager import aggregation, products, topk


@pytest.fixture(params=[2 ** 23, 4096], ids=['one chunk', 'many chunks'])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(_common, 'CHUNK_BYTES', request.param)


@pytest.fixture(params=[False, True], ids=['gather first', 'multiply first'])
def order(request, monkeypatch):
    monkeypatch.setattr(aggregation, 'multiplies_first', lambda *args: request.param)


@pytest.fixture(params=[False, True], ids=['product', 'convolution'])
def by_convolution(request, monkeypatch):
    monkeypatch.setattr(products, 'convolutions_are_faster', lambda: request.param)
    monkeypatch.setattr(products, 'LEAST_PRODUCT', 0)
    monkeypatch.setattr(products, 'LEAST_ROWS', 0)


@pytest.fixture(params=[1, 2 ** 30], ids=['by column', 'by row'])
def least_columns(request, monkeypatch):
    monkeypatch.setattr(topk, 'LEAST_COLUMNS', request.param)


@pytest.fixture
def float32_precision():
    """How a program lets float32 matrices be multiplied; as before after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    torch.set_float32_matmul_precision(before)
