"What readers meet, checked without Quarto: links and pictures, titles, directives, docstrings, and what README says of commands and calls"
import ast, inspect, re
from collections import Counter
from importlib import import_module
from packaging.utils import canonicalize_name

FENCE = re.compile(r'^(```|~~~).*?^\1\s*$', re.M|re.S)
LINK  = re.compile(r'\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)|(?:src|href)="([^"]+)"')
PAGES = 'README.md','CONTRIBUTING.md','CHANGELOG.md'

def prose(text): return re.sub(r'`[^`\n]*`', '', FENCE.sub('', text))
def links(text): return [a or b for a,b in LINK.findall(prose(text))]

def anchors(text):
    "What `#…` can point to: headings as Quarto and GitHub name them"
    def slug(h): return re.sub(r'[^\w\s-]', '', re.sub(r'\s*\{#.*\}$', '', h).lower()).strip().replace(' ', '-')
    return {slug(h) for h in re.findall(r'^#+\s+(.*)$', FENCE.sub('', text), re.M)}

def words(path, notebooks):
    "The prose of a page"
    found = [nb for nb in notebooks if nb.path == path]
    return '\n\n'.join(c.src for c in found[0].cells if c.type == 'markdown') if found else path.read_text(encoding='utf-8')

def trouble(link, page, text, top, notebooks):
    "Why a link does not lead anywhere; None if it does"
    path,_,at = link.partition('#')
    target = (page.parent/path).resolve() if path else page
    if not target.exists(): return 'is not there'
    if top not in (target, *target.parents): return 'is not part of the site'
    if at and target.suffix in ('.md','.ipynb') and at not in anchors(words(target, notebooks) if path else text): return 'has no such heading'

def dead(page, text, top, notebooks): return [f'{page.relative_to(top)}: {o} {why}' for o in links(text) if not re.match(r'[a-z]+:', o) and (why := trouble(o, page, text, top, notebooks))]

def test_no_dead_links_or_pictures(root, notebooks):
    "Within the repository; a notebook must also stay within the site, which is made of `nbs/` alone"
    found = [o for nb in notebooks for o in dead(nb.path, words(nb.path, notebooks), root/'nbs', notebooks)]
    for name in PAGES: found += dead(root/name, (root/name).read_text(encoding='utf-8'), root, notebooks)
    assert not found, '\n'.join(found)

def test_dead_links_are_found(root, notebooks):
    page,top = root/'nbs'/'index.ipynb',root/'nbs'
    text = '# A title: of two\n[a](00_core.ipynb) [b](gone.ipynb) ![](images/demo.jpg) ![](images/gone.png) [c](../LICENSE) [d](#a-title-of-two) [e](#nowhere) `[x](y)`\n```\n[f](g)\n```\n<img src="lost.png">'
    assert [o.split()[1] for o in dead(page, text, top, notebooks)] == ['gone.ipynb','images/gone.png','../LICENSE','#nowhere','lost.png']

def test_links_to_this_repository(root, settings, notebooks):
    "Absolute links into the repository name files that are there"
    here = settings['git_url'] + '/blob/' + settings['branch'] + '/'
    found = [o for p in [*(nb.path for nb in notebooks), *(root/n for n in PAGES)] for o in links(words(p, notebooks)) if o.startswith(here)]
    assert found and not [o for o in found if not (root/o.removeprefix(here).partition('#')[0]).exists()]

def test_sidebar_and_settings_name_files(root):
    assert (root/'nbs'/'styles.css').exists() and (root/'_quarto.yml').read_text() == (root/'nbs'/'_quarto.yml').read_text()
    tasks = re.findall(r'- text: "(.+)"\n\s+href: (\S+)$', (root/'nbs'/'sidebar.yml').read_text(), re.M)
    assert len(tasks) > 10 and not [f for _,f in tasks if not (root/'nbs'/f).exists()]

def test_titles_differ(notebooks):
    "Two pages of one name cannot be told apart in the sidebar"
    n = Counter(nb.cells[0].src.splitlines()[0] for nb in notebooks if not nb.name.startswith('bench/'))
    assert not [k for k,v in n.items() if v > 1]

DIRECTIVES = {'default_exp','export','exporti','exports','hide','hide_input','hide_output','eval','echo','output','slow','cuda','code-fold'}

def test_directives_are_known(notebooks):
    "A misspelt directive does nothing, and says nothing"
    found = [f'{nb.name}: {m[1]}' for nb in notebooks for c in nb.cells if c.type == 'code' for m in re.finditer(r'^#\s?\|\s*([\w-]+)', c.src, re.M) if m[1] not in DIRECTIVES]
    assert not found, '\n'.join(found)

def test_exported_symbols_are_documented(root, notebooks):
    "Each public function and class of a module says in a docstring what it is for"
    found = []
    for nb in notebooks:
        if not nb.module: continue
        tree = ast.parse((root/'lipsync_nb'/(nb.module.replace('.', '/')+'.py')).read_text(encoding='utf-8'))
        public = next(ast.literal_eval(o.value) for o in tree.body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == '__all__')
        found += [f'{nb.name}: {o.name}' for o in tree.body if isinstance(o, (ast.FunctionDef,ast.ClassDef)) and o.name in public and not ast.get_docstring(o)]
    assert not found, '\n'.join(found)

def command(settings, name):
    scripts = dict(o.split('=') for o in settings['console_scripts'].split())
    if name not in scripts: return None
    mod,_,f = scripts[name].partition(':')
    return getattr(import_module(mod), f)

def test_commands_on_the_pages(root, settings, notebooks):
    "Every command that README shows exists and takes the flags that are shown; every command is shown"
    text = (root/'README.md').read_text(encoding='utf-8'); seen = set(re.findall(r'\blipsync_[a-z_]+\b', text)) - {'lipsync_nb'}
    scripts = [o.partition('=')[0] for o in settings['console_scripts'].split()]
    assert not sorted(seen - {*scripts}) and not sorted({*scripts} - seen - {'lipsync_demo'})
    for line in re.findall(r'^lipsync_.*$', text, re.M):
        name = line.split()[0]; takes = inspect.signature(command(settings, name)).parameters
        assert not [o for o in re.findall(r'--(\w+)', line.partition('#')[0]) if o not in takes], line

def test_commands_in_notebooks(settings, notebooks):
    "No page speaks of a command that does not exist"
    scripts = {o.partition('=')[0] for o in settings['console_scripts'].split()}
    named = {(nb.name,o) for nb in notebooks for c in nb.cells if c.type == 'markdown' for o in re.findall(r'`(lipsync_[a-z_]+)[^`]*`', c.src)}
    assert not sorted(o for o in named if o[1] not in scripts | {'lipsync_nb'})

def python_blocks(text): return [m[1] for m in re.finditer(r'^```python\n(.*?)^```', text, re.M|re.S)]

def test_python_of_readme_fits(root):
    "README's Python parses, what it imports is there, and its calls fit"
    from lipsync_nb.infer.core import LipSync
    known,calls = {'lip.dub': lambda *a, **k: inspect.signature(LipSync.dub).bind(None, *a, **k)},0
    for block in python_blocks((root/'README.md').read_text(encoding='utf-8')):
        tree = ast.parse(block)
        for o in ast.walk(tree):
            if isinstance(o, ast.ImportFrom): known |= {a.name: getattr(import_module(o.module), a.name) for a in o.names}
        for o in ast.walk(tree):
            if not isinstance(o, ast.Call) or (f := known.get(ast.unparse(o.func))) is None: continue
            args,kw = [None]*len(o.args),{k.arg: None for k in o.keywords}; calls += 1
            f(*args, **kw) if ast.unparse(o.func) == 'lip.dub' else inspect.signature(f).bind(*args, **kw)
    assert calls >= 5

def test_readme_pins_what_is_pinned(root):
    "Where README gives a version, it is the one that is tested"
    pins = {canonicalize_name(k): v for k,v in re.findall(r'^([\w.-]+)==(\S+)', (root/'constraints.txt').read_text(), re.M)}
    named = re.findall(r'([\w.-]+)==(\d[\w.]*\w)', (root/'README.md').read_text(encoding='utf-8'))
    assert named and not [(k,v) for k,v in named if pins.get(canonicalize_name(k)) != v]
