"""Write results/README.md: one row for every run folder under results/, from the files that the run left there.

    python train_scripts/results_table.py
"""
import csv
import json
from pathlib import Path

import yaml

RESULTS = Path(__file__).parent / 'results'
HEADER = """# Results

Last epoch, whole test set, mean over images. Made by `python train_scripts/results_table.py` from the run folders here; each
holds the arguments, environment, summary and curve that its command left (`environment.json` has the command and the commit), and
`evaluation.txt`, what `convnn-timm train --evaluate RUN` printed of the saved weights afterwards.

CIFAR-10 here is a JPEG re-encoding (quality 75) of the original images, as `train/<class>/*.jpg` and `validation/<class>/*.jpg`: its
accuracies are not those of the original data. One epoch tests the machinery, it ranks nothing: repetitions of a whole training
differ by half a point and first epochs by much more. *Authors' top-1* is that of the same epoch in their logs (on the original images),
then of their code run once on the JPEG images.

"""
# The authors' recorded top-1 after as many epochs, on the original images, and that of their code on the JPEG images.
AUTHORS = {
    ('paper_vgg11_ratio0', 1): '51.1, 54.0 on JPEG',
    ('paper_vgg11_ratio0.5', 1): '49.8, 42.3 on JPEG',
}


def table_row(run: Path) -> str:
    args = yaml.safe_load((run / 'args.yaml').read_text())
    environment = json.loads((run / 'environment.json').read_text())
    last = list(csv.DictReader((run / 'summary.csv').open()))[-1]
    epochs = int(last['epoch']) + 1
    arguments = ' '.join(f'{name}={value}' for name, value in args['model_kwargs'].items())
    machine = environment['gpu'] or f"{environment['cpu']}, {environment['threads']} thread"
    cells = [
        f'[{run.name}]({run.name})', f"{args['model']} {arguments}", str(args['seed']), str(epochs),
        f"{float(last['eval_top1']):.2f}", f"{float(last['eval_top5']):.2f}", AUTHORS.get((run.name, epochs), ''),
        f"{float(last['train_images_per_s']):.0f}", f"{float(last['train_data_share']):.2%}", machine]
    return '| ' + ' | '.join(cells) + ' |\n'


def main() -> None:
    names = ['run', 'model', 'seed', 'epochs', 'top-1', 'top-5', "authors' top-1", 'images/s', 'waiting for data', 'machine']
    rows = [table_row(path.parent) for path in sorted(RESULTS.glob('*/summary.csv'))]
    table = f"| {' | '.join(names)} |\n{'|---' * len(names)}|\n{''.join(rows)}"
    (RESULTS / 'README.md').write_text(HEADER + table)


if __name__ == '__main__':
    main()
