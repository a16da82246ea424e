"Each module imports alone, without what it should not need, and depends only on notebooks with a lower number"
import ast, json, os, subprocess, sys
import pytest

# Packages that only one job needs: no module may import them at its head
LAZY = ['mediapipe', 'nbdev', 'librosa', 'torchvision', 'wandb', 'espeakng_loader', 'skimage', 'praatio', 'pocketsphinx', 'dask', 'distributed', 'fsspec', 'torchmetrics', 'torch_fidelity', 'silero_vad', 'onnx', 'onnxscript', 'onnxruntime', 'c2pa', 'cryptography', 'voila', 'tornado']
# Modules of plain torch, and all that they may import
PURE,PURE_MAY = ('models.', 'losses', 'gan', 'metrics', 'sets', 'mouth'),{'torch', 'numpy', 'fastcore', 'pytorch_msssim'}
# ... including their own kind and the core's constants and errors
PURE_OWN = ('core',)+PURE

# Run in a fresh process: hide packages, load torch and other people's large packages once, then import each module in a fork of its own
CHILD = '''
import json, os, sys, traceback
hidden,modules,first = json.loads(sys.argv[1])
for o in hidden: sys.modules[o] = None
for m in ['torch', *first]: __import__(m)
for m in modules:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try: __import__(m)
        except BaseException: print(json.dumps([m, traceback.format_exc()])); sys.stdout.flush(); os._exit(1)
        os._exit(0)
    _,status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status): print(json.dumps([m, f'killed by signal {os.WTERMSIG(status)}']))
'''

def is_pure(module): return module.startswith(PURE)

def import_alone(root, modules, hidden, first=()):
    "{module: traceback} of those `modules` that fail to import, each alone, with the `hidden` packages missing; packages in `first` are loaded once for all"
    arg = json.dumps([hidden, [f'lipsync_nb.{m}' for m in modules], first])
    r = subprocess.run([sys.executable, '-c', CHILD, arg], cwd=root, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr
    return dict(json.loads(o) for o in r.stdout.splitlines() if o.startswith('["lipsync_nb'))

@pytest.fixture(scope='module')
def modules(notebooks): return {nb.module: nb for nb in notebooks if nb.module}

def source(root, module): return root/'lipsync_nb'/(module.replace('.', '/') + '.py')

def imported(root, module):
    "Names of the modules that `module` imports anywhere, functions included; own ones come as '.name'"
    package = ['lipsync_nb', *module.split('.')[:-1]]
    for node in ast.walk(ast.parse(source(root, module).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            head = package[:len(package)+1-node.level] if node.level else []
            base = '.'.join([*head, *([node.module] if node.module else [])])
            names = [base] if node.module else [f'{base}.{a.name}' for a in node.names]
        else: continue
        for o in names: yield o.removeprefix('lipsync_nb') if o.startswith('lipsync_nb.') else o

def test_pure_modules_import_without_fastai(root, modules):
    pure = [m for m in modules if is_pure(m)]
    assert pure and not import_alone(root, pure, [*LAZY, 'fastai', 'accelerate', 'av', 'cv2', 'pandas', 'simplejpeg', 'matplotlib'])

def test_all_other_modules_import_without_lazy_packages(root, modules):
    rest = [m for m in modules if not is_pure(m)]
    assert rest and not import_alone(root, rest, LAZY, ['fastai.learner', 'accelerate', 'pandas', 'pyarrow', 'matplotlib', 'scipy'])

def test_import_alone_sees_failures(root, tmp_path):
    "The check itself: a hidden package and a missing module both show"
    assert 'ModuleNotFoundError' in import_alone(root, ['core'], ['fastcore'])['lipsync_nb.core']
    assert 'ModuleNotFoundError' in import_alone(root, ['no_such_module'], [])['lipsync_nb.no_such_module']

def test_imports_go_down_in_number(root, modules):
    wrong = [f'{nb.name} imports {o}' for m,nb in modules.items() for o in imported(root, m)
             if o.startswith('.') and o != '.__version__' and (o[1:] not in modules or modules[o[1:]].num >= nb.num)]
    assert not wrong, '\n'.join(wrong)

def test_pure_modules_are_plain_torch(root, modules):
    def fine(o):
        if o.startswith('.'): return o[1:].startswith(PURE_OWN)
        top = o.partition('.')[0]
        return top in PURE_MAY or top in sys.stdlib_module_names
    wrong = [f'{m} imports {o}' for m in modules if is_pure(m) for o in imported(root, m) if not fine(o)]
    assert not wrong, '\n'.join(wrong)

def test_never_torchvision(root, modules):
    wrong = [f'{m} imports {o}' for m in modules for o in imported(root, m) if o.startswith(('torchvision', 'fastai.vision'))]
    assert not wrong, '\n'.join(wrong)
