"What the tests of the repository share: where it is, its settings, its notebooks and which module each one makes"
import importlib.util, json, re, signal
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace
import pytest

ROOT = Path(__file__).resolve().parent.parent

# A shell that starts a job in the background makes it ignore Ctrl-C, and children inherit that: tests that press it want it back
signal.signal(signal.SIGINT, signal.default_int_handler)

def read_notebook(path):
    "One library notebook: its number, title cell, cells, and the module that it exports to (None for a page of prose)"
    nb = json.loads(path.read_text(encoding='utf-8'))
    cells = [SimpleNamespace(type=c['cell_type'], src=''.join(c['source']), outputs=c.get('outputs', [])) for c in nb['cells']]
    exp = [m[1] for c in cells if c.type=='code' for m in re.finditer(r'^#\|\s*default_exp\s+(\S+)', c.src, re.M)]
    num = re.match(r'(\d+)([a-z]?)_', path.name)
    return SimpleNamespace(path=path, name=path.relative_to(ROOT/'nbs').as_posix(), cells=cells,
                           num=(int(num[1]), num[2]) if num else None, module=exp[0] if exp else None)

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def notebooks():
    "All notebooks but drafts (named `_…`) and checkpoints, in order"
    files = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(o.startswith(('_', '.')) for o in p.relative_to(ROOT).parts))
    return [read_notebook(p) for p in files]

@pytest.fixture(scope='session')
def settings():
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

@pytest.fixture(scope='session')
def tool():
    "Import a script of tools/ by name"
    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT/'tools'/f'{name}.py')
        mod = importlib.util.module_from_spec(spec); spec.loader.exec_module(mod)
        return mod
    return load

# Files that take longest: begun first, so that in the end no core waits for one of them. Each file stays with one process
LONG = ['expert', 'preprocess', 'ranks', 'repo', 'eval_cli', 'sparse', 'scale', 'train_faults', 'train_kill', 'eval', 'infer']

def pytest_collection_modifyitems(items):
    place = {f'test_{o}.py': i for i,o in enumerate(LONG)}
    items.sort(key=lambda o: place.get(o.path.name, len(LONG)))
