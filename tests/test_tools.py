"The scripts of tools/: the README's rendering, the lock's markers, the check of the Python that sets up"
from base64 import b64encode
from types import SimpleNamespace
import pytest

def md(src):              return dict(cell_type='markdown', source=src.splitlines(True))
def py(src, *outputs):    return dict(cell_type='code', source=src.splitlines(True), outputs=list(outputs))
def stream(text):         return dict(output_type='stream', name='stdout', text=[text])
def result(**data):       return dict(output_type='execute_result', data={k.replace('_', '/'): v for k,v in data.items()})

@pytest.fixture
def render(tool):
    "The body of README.md for some cells, and its pictures"
    def f(*cells):
        text,pics = tool('readme').render(dict(cells=cells))
        return text.partition('-->')[2].strip(), pics
    return f

def test_readme_links_start_at_the_root(render):
    text,_ = render(md('[a](images/a.png) <img src="images/b.png"> [c](../LICENSE) [d](https://x.org/y) [e](#top)'))
    assert text == '[a](nbs/images/a.png) <img src="nbs/images/b.png"> [c](LICENSE) [d](https://x.org/y) [e](#top)'

def test_readme_leaves_code_alone(render):
    src = '```python\nd = {}\nx[0](y)\n```'
    assert render(md(src))[0] == src

def test_readme_code_and_outputs(render):
    text,_ = render(py('1+1', result(text_plain=['2'])), py('print(3)', stream('3\n')))
    assert text == '```python\n1+1\n```\n\n```text\n2\n```\n\n```python\nprint(3)\n```\n\n```text\n3\n```'

def test_readme_directives(render):
    assert render(py('#| hide\nsecret()', stream('x')))[0] == ''
    assert render(py('#| echo: false\nf()', stream('x')))[0] == '```text\nx\n```'
    assert render(py('#|output: false\n#| eval: false\nf()', stream('x')))[0] == '```python\nf()\n```'

def test_readme_pictures(render):
    text,pics = render(py('plot()', result(image_png=b64encode(b'PNG').decode(), text_plain='<Figure>')))
    assert text.endswith('![](index_files/cell-0-0.png)') and pics == {'index_files/cell-0-0.png': b'PNG'}

def test_readme_refuses_what_it_cannot_show(render):
    with pytest.raises(ValueError, match='cannot show'): render(py('w', result(widget_view='{}')))

def test_lock_keeps_only_markers_that_decide(tool):
    simplify = tool('lock').simplify
    env = "((platform_machine == 'arm64' and sys_platform == 'darwin') or (platform_machine == 'x86_64' and sys_platform == 'linux'))"
    assert simplify(f"a==1 ; python_full_version < '3.13' and {env}") == 'a==1'
    assert simplify(f"a==1 ; python_full_version < '3.11' and {env}") == "a==1 ; python_full_version < '3.11'"
    assert simplify(f"a==1 ; python_full_version >= '3.11' and python_full_version < '3.13' and {env}") == "a==1 ; python_full_version >= '3.11'"
    assert simplify("a==1 ; python_full_version < '3.13' and platform_machine == 'arm64' and sys_platform == 'darwin'") == "a==1 ; sys_platform == 'darwin'"

@pytest.mark.parametrize('version,system,machine,says', [
    ((3,10), 'linux', 'x86_64', None), ((3,12), 'darwin', 'arm64', None),
    ((3,9), 'linux', 'x86_64', 'is 3.9'), ((3,13), 'linux', 'x86_64', 'is 3.13'), ((3,11), 'linux', 'aarch64', 'linux aarch64')])
def test_check_python(tool, monkeypatch, version, system, machine, says):
    check = tool('check_python')
    monkeypatch.setattr(check, 'sys', SimpleNamespace(version_info=version, platform=system, executable='python'))
    monkeypatch.setattr(check.platform, 'machine', lambda: machine)
    found = check.trouble()
    assert found is None if says is None else says in found and found.count('\n') == 0
