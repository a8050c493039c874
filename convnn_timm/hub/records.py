"""What training runs recorded: their arguments, results and machines, read for cards and copied beside weights."""
import json
import os
import re
import shutil
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import yaml

from convnn_timm.models._weights import WeightsError
from convnn_timm.train.flags import complete, places
from convnn_timm.train.run_folder import read_summary, without_folders

__all__ = ['PLACES', 'Record', 'accuracy', 'check_repetitions', 'compared', 'copy_record', 'machine_name', 'read_runs']

# Arguments that say where a run reads, writes and computes, not what. (Without `cache` the random crops are others, of
# the same distribution.)
PLACES = places()


class Record:
    """What a run recorded: its arguments, a row for each epoch, and the environment of each part, resumed ones last."""

    def __init__(self, folder: Path):
        later = sorted(folder.glob('environment-*.json'), key=lambda file: int(file.stem.partition('-')[2]))
        self.args = complete(yaml.safe_load((folder / 'args.yaml').read_text()))
        self.summary = read_summary(folder)
        self.environments = [json.loads(file.read_text()) for file in (folder / 'environment.json', *later)]

    def last(self, column: str) -> float:
        """A column of the summary after the last epoch."""
        return float(self.summary[-1][column])

    @property
    def epochs(self) -> int:
        return int(self.last('epoch')) + 1

    @property
    def images(self) -> int:
        """How many images the run was evaluated on."""
        return int(self.last('eval_images'))

    @property
    def speed(self) -> float:
        """Training images per second in the median epoch of full-size images: other programs may slow single epochs."""
        rows = self.summary[len(self.args['train_sizes'] or ()):] or self.summary
        return median(float(row['train_images_per_s']) for row in rows)

    @property
    def machines(self) -> List[str]:
        """Where the run ran: several machines if it was resumed elsewhere."""
        return [*dict.fromkeys(map(machine_name, self.environments))]

    @property
    def machine(self) -> str:
        return ', then '.join(self.machines)

    @property
    def software(self) -> str:
        """Versions of the packages, and the commits of this one."""
        versions = ', '.join(f'{name} {self.environments[0][name]}' for name in ('timm', 'torch', 'convnn_timm'))
        commits = dict.fromkeys(
            e['commit'] + (' with uncommitted changes' if e['uncommitted_changes'] else '')
            for e in self.environments if e['commit'])
        return f'{versions} at commit {", then ".join(commits)}' if commits else versions


def read_runs(folder: Path) -> List[Record]:
    """The record in a folder, and those of its repetitions in the folder's seeds/."""
    repetitions = sorted((folder / 'seeds').glob('*'), key=lambda path: int(path.name))
    return [Record(path) for path in (folder, *repetitions)]


def compared(runs: Sequence[Record], twins: Sequence[Record]) -> Optional[Tuple[Record, Record]]:
    """The first run and twin with one seed and on one machine, whose speeds compare; None without any."""
    pairs = ((run, twin) for run in runs for twin in twins
             if run.args['seed'] == twin.args['seed'] and run.machines == twin.machines and len(run.machines) == 1)
    return next(pairs, None)


def accuracy(runs: Sequence[Record], column: str = 'eval_top1') -> str:
    """The mean over runs after their last epoch, and with several runs the sample standard deviation."""
    values = [run.last(column) for run in runs]
    return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def machine_name(environment: Dict[str, Any]) -> str:
    """The processor that an environment.json names."""
    threads, capability = environment['threads'], environment.get('cpu_capability')
    vectors = f' with {capability}' if capability else ''
    if environment.get('cpu_amx'):
        vectors += ' and AMX'
    return environment['gpu'] or f'{environment["cpu"]}{vectors}, {threads} thread{"s" if threads > 1 else ""}'


def check_repetitions(run: Path, seeds: Sequence[Path]) -> None:
    """Make sure that `seeds` are the training of `run`, each with a seed of its own."""
    first, used = Record(run), {}
    for folder in (run, *seeds):
        record = Record(folder)
        args, seed = record.args, record.args['seed']
        keys = {*first.args, *args} - PLACES - {'seed'}
        if different := [key for key in sorted(keys) if first.args.get(key) != args.get(key)]:
            raise WeightsError(f'{folder} is no repetition of {run}: they differ in {", ".join(different)}')
        if record.epochs != first.epochs:
            raise WeightsError(f'{folder} has {record.epochs} epochs, {run} {first.epochs}')
        if record.images != first.images:
            raise WeightsError(f'{folder} was evaluated on {record.images} images, {run} on {first.images}')
        if seed in used:
            raise WeightsError(f'{folder} and {used[seed]} have the same seed, {seed}')
        used[seed] = folder


def copy_record(run: Path, folder: Path, seeds: Iterable[Path] = ()) -> None:
    """Copy what a run and its repetitions recorded, without folders of the machine that they ran on."""
    folder.mkdir(parents=True)
    for name in ('summary.csv', 'curve.png', 'args.yaml', 'recipe.yaml'):
        if (run / name).is_file():
            shutil.copy(run / name, folder)
    for file in folder.glob('*.yaml'):
        args = yaml.safe_load(file.read_text(encoding='utf-8'))
        named = {key: without_folders(value) if isinstance(value, str) else value for key, value in args.items()}
        if named != args:  # else the file keeps its comments
            file.write_text(yaml.safe_dump(named, sort_keys=False))
    args = yaml.safe_load((run / 'args.yaml').read_text())
    paths = [value for value in args.values() if isinstance(value, str) and os.path.isabs(value)]
    for file in run.glob('environment*.json'):
        record = json.loads(file.read_text())
        for path in paths:  # known from the arguments, they may contain spaces
            record['command'] = re.sub(
                rf'(?<![^\s=]){re.escape(path)}(?!\S)', lambda _: Path(path).name, record['command'])
        record['command'] = ' '.join(map(without_folders, record['command'].split(' ')))
        (folder / file.name).write_text(json.dumps(record, indent=2) + '\n')
    for repetition in seeds:
        copy_record(repetition, folder / 'seeds' / str(Record(repetition).args['seed']))
