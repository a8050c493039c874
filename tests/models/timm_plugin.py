"""Pytest plugin that runs timm's own tests/test_models.py on the models of this project (see test_timm_contract.py).

Wherever timm parametrizes a test with its `resnet18` or its `vgg11`, the project's ResNets or VGGs take that place: in
tests over all models, over the models of some modules, over a list of names. All other tests are deselected.

    pytest -p timm_plugin --project-models vgg11_convnn,resnet18_convnn test_models.py
"""
import pytest
import timm

import convnn_timm.models  # noqa: F401

# They load weights from the Hub. timm's continuous integration leaves them out as well.
NEED_WEIGHTS = {'test_model_load_pretrained', 'test_model_features_pretrained'}


def stands_for(model: str) -> str:
    """The model of timm whose tests a model of this project takes."""
    return 'vgg11' if model.startswith('vgg') else 'resnet18'


def pytest_addoption(parser):
    parser.addoption('--project-models', required=True, type=lambda names: names.split(','))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    models = metafunc.config.getoption('--project-models')
    marks = metafunc.definition.own_markers
    marks[:] = [_substitute(mark, models) if mark.name == 'parametrize' else mark for mark in marks]


def _substitute(mark, models):
    names, values = mark.args
    if names.split(',')[0] != 'model_name':
        return mark
    values = [(value,) if isinstance(value, str) else value for value in values]
    ours = []
    for model in models:
        found = [value for value in values if value[0].split('.')[0] == stands_for(model)]
        if found and '.' in found[0][0]:  # a test over names with tags
            ours += timm.list_models(model, include_tags=True)
        else:
            ours += [(model, *rest) if rest else model for _, *rest in found]
    return pytest.mark.parametrize(names, ours).mark if ours else mark


def pytest_collection_modifyitems(config, items):
    models = config.getoption('--project-models')

    def is_ours(item):
        model = item.callspec.params.get('model_name', '') if hasattr(item, 'callspec') else ''
        return model.split('.')[0] in models and item.originalname not in NEED_WEIGHTS

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = filter(is_ours, items)
