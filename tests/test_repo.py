"The repository agrees with itself: notebooks and modules, README and index, settings, pins, sidebar; nothing stray is kept"
import ast, re, shutil, subprocess, sys
from importlib.metadata import entry_points
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

KB = 1024
MAX_OUTPUT,MAX_NOTEBOOK,MAX_FILE = 200*KB,1024*KB,2048*KB

@pytest.fixture(scope='module')
def tracked(root):
    "Files that git tracks or would track"
    if not ((root/'.git').exists() and shutil.which('git')): pytest.skip('not a git checkout')
    r = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=root, capture_output=True, text=True, check=True)
    return [p for o in r.stdout.split('\0') if o and (p := root/o).is_file()]

@pytest.fixture(scope='module')
def copy(root, tmp_path_factory):
    "A copy of what nbdev works on, so that no test writes into the checkout"
    d = tmp_path_factory.mktemp('copy')
    for o in ('settings.ini', 'setup.py'): shutil.copy(root/o, d/o)
    for o in ('nbs', 'lipsync_nb'): shutil.copytree(root/o, d/o, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    return d

def run_nbdev(command, cwd): subprocess.run([Path(sys.executable).with_name(command)], cwd=cwd, check=True)

def differing(root, copy, pattern):
    "Files under `pattern` that are not the same, or not there, in `root` and `copy`"
    def files(d): return {o: (d/o).read_bytes() for p in d.glob(pattern) if not re.search(r'(^|/)\.', o := p.relative_to(d).as_posix())}
    a,b = files(root),files(copy)
    return sorted(o for o in a.keys()|b.keys() if a.get(o) != b.get(o))

def test_modules_are_the_notebooks_export(root, copy):
    for p in (copy/'lipsync_nb').rglob('*.py'):
        if p.name != '__init__.py': p.unlink()
    run_nbdev('nbdev_export', copy)
    assert not differing(root, copy, 'lipsync_nb/**/*.py')

def test_notebooks_are_clean(root, copy):
    run_nbdev('nbdev_clean', copy)
    assert not differing(root, copy, 'nbs/**/*.ipynb')

# Process the notebooks for the docs one after another, each announced by its name
PROC = '''
import traceback
import nbdev.serve_drv as drv
from nbdev.serve import proc_nbs
main = drv.main
def named(job):
    print('=====', job[0].name, flush=True)
    try: main(job)
    except Exception: traceback.print_exc()
drv.main = named
proc_nbs('', n_workers=0)
'''

def test_docs_process(copy, notebooks):
    "All that `make docs` does before Quarto: each exported symbol and each `show_doc` renders"
    r = subprocess.run([sys.executable, '-c', PROC], cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert r.returncode == 0, r.stdout
    failed = [o for o in re.sub(r'\x1b\[[0-9;]*m', '', r.stdout).split('=====') if 'Traceback' in o]
    assert not failed, '\n'.join(f'{o.splitlines()[0]}: {o.splitlines()[-1]}' for o in map(str.strip, failed))
    assert not [nb.name for nb in notebooks if not (copy/'_proc'/nb.name).exists()]

def test_readme_is_the_index(root, tool):
    readme = tool('readme')
    stale = [o for o,data in readme.render_index().items() if not (root/o).exists() or (root/o).read_bytes() != data]
    assert not stale, f'run `make readme`: {stale}'

def test_notebooks_have_title_and_purpose(notebooks):
    wrong = [nb.name for nb in notebooks if nb.cells[0].type != 'markdown' or not re.match(r'# \S.*\n+(- .*\n+)*> \S', nb.cells[0].src)]
    assert not wrong

def test_module_names_are_the_notebooks(notebooks):
    "`11_data.face.ipynb` makes `data.face`"
    assert not [nb.name for nb in notebooks if nb.num is not None and nb.module and nb.path.stem.split('_', 1)[1] != nb.module]

def test_notebook_sizes(notebooks):
    def size(o): return len(str(o.get('data', o.get('text', ''))))
    wrong = [f'{nb.name}: {nb.path.stat().st_size//KB} KiB' for nb in notebooks if nb.path.stat().st_size > MAX_NOTEBOOK]
    wrong += [f'{nb.name}: an output of {size(o)//KB} KiB' for nb in notebooks for c in nb.cells for o in c.outputs if size(o) > MAX_OUTPUT]
    assert not wrong, '\n'.join(wrong)

def test_no_saved_errors(notebooks):
    assert not [nb.name for nb in notebooks for c in nb.cells for o in c.outputs if o['output_type'] == 'error']

def test_notebooks_never_use_torchvision(notebooks):
    pattern = re.compile(r'^\s*(?:from|import)\s+(?:torchvision|fastai\.vision)\b', re.M)
    assert not [nb.name for nb in notebooks for c in nb.cells if c.type == 'code' and pattern.search(c.src)]

def test_sidebar_names_every_notebook_once(root, notebooks):
    named = re.findall(r'^\s*- (\S+\.ipynb)$', (root/'nbs'/'sidebar.yml').read_text(), re.M)
    assert sorted(named) == sorted(nb.name for nb in notebooks)

def test_no_path_of_a_machine(root, tracked):
    "Neither sources nor saved outputs hold an absolute path of somebody's home, work or temporary folder"
    pattern = re.compile(r'(?<![\w.~}>)/-])/(?:home|root|work|Users|tmp)/[\w.-]+')
    found = []
    for p in tracked:
        try: text = p.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{p.relative_to(root)}: {m[0]}' for m in pattern.finditer(text)]
    assert not found, '\n'.join(found)

def test_no_large_files(root, tracked):
    assert not [f'{p.relative_to(root)}: {p.stat().st_size//KB} KiB' for p in tracked if p.stat().st_size > MAX_FILE]

def test_console_scripts_are_installed_and_callable(settings):
    scripts = dict(o.split('=') for o in settings['console_scripts'].split())
    assert scripts and all(o.startswith('lipsync_') for o in scripts)
    installed = {e.name: e for e in entry_points(group='console_scripts') if e.value.startswith('lipsync_nb')}
    assert {k: e.value for k,e in installed.items()} == scripts, 'run `make setup`'
    assert all(callable(e.load()) for e in installed.values())

def requirements(settings, *keys): return [Requirement(o) for k in keys for o in settings[k].split()]

def test_pins_meet_the_settings(root, settings):
    "Every requirement of the settings has a pin that fits it, and every pin is exact"
    pins = {}
    for line in (root/'constraints.txt').read_text().splitlines():
        if line.startswith('#'): continue
        r = Requirement(line)
        assert re.fullmatch(r'==[\w.]+', str(r.specifier)), line
        pins.setdefault(canonicalize_name(r.name), []).append(r.specifier)
    for r in requirements(settings, *(k for k in settings if k.endswith('requirements') and k != 'fid_requirements')): # those want torchvision's operators, which a CPU-only torch lacks
        found = pins.get(canonicalize_name(r.name), [])
        assert found, f'run tools/lock.py: {r.name} has no pin'
        for o in found: assert r.specifier.contains(str(o)[2:]), f'run tools/lock.py: {r} against {o}'

def test_library_imports_are_declared(root, settings):
    "Whatever a module imports is a requirement by name, or in an extra, or comes with one on purpose"
    package = {'PIL': 'pillow', 'skimage': 'scikit-image', 'cv2': 'mediapipe', 'c2pa': 'c2pa-python'}  # where import and package differ in name
    declared = {'lipsync-nb'} | {canonicalize_name(r.name) for r in requirements(settings, *(k for k in settings if k.endswith('requirements') and k != 'dev_requirements'))}
    wrong = set()
    for p in (root/'lipsync_nb').rglob('*.py'):
        for node in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {o.partition('.')[0] for o in names} - set(sys.stdlib_module_names):
                if canonicalize_name(package.get(top, top)) not in declared: wrong.add(f'{p.relative_to(root)} imports {top}')
    assert not wrong, '\n'.join(sorted(wrong))
