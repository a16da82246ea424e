"""Render nbs/index.ipynb to README.md, without Quarto: `make readme`.

Markdown cells pass as they are, but for relative links, which start from nbs/ there and from the root here. Code cells follow
as Python blocks with their text, markdown and picture outputs; pictures go to index_files/. Of the directives it knows
`hide`, `echo: false` and `output: false`; a line of any other directive is dropped."""
import json, posixpath, re
from base64 import b64decode
from pathlib import Path

root = Path(__file__).resolve().parent.parent
fences = re.compile(r'(^(?:```|~~~).*?^(?:```|~~~)\s*?$)', re.M|re.S)
links = re.compile(r'''(\]\(|(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)''')

def directives(src):
    "The directives of a code cell, and its source without them"
    lines = src.splitlines()
    found = [re.sub(r'^#\|\s*', '', o).strip() for o in lines if re.match(r'#\s?\|', o)]
    return found, '\n'.join(o for o in lines if not re.match(r'#\s?\|', o)).strip()

def relink(md):
    "`md` with links relative to the notebook's folder turned into links relative to the root, code blocks apart"
    def fix(m): return m[1] + posixpath.normpath(posixpath.join('nbs', m[2]))
    return ''.join(o if i%2 else links.sub(fix, o) for i,o in enumerate(fences.split(md)))

def output(o, name):
    "Markdown of one output `o`, and the pictures it needs as {path: bytes}; a picture is named after `name`"
    if o['output_type'] == 'stream': return '```text\n' + ''.join(o['text']).rstrip() + '\n```', {}
    data = {k: ''.join(v) if isinstance(v, list) else v for k,v in o.get('data', {}).items()}
    if 'image/png'     in data: return f'![]({name}.png)', {f'{name}.png': b64decode(data['image/png'])}
    if 'text/markdown' in data: return relink(data['text/markdown']), {}
    if 'text/plain'    in data: return '```text\n' + data['text/plain'].rstrip() + '\n```', {}
    raise ValueError(f"index.ipynb: README.md cannot show the {o['output_type']!r} output of {name}")

def render(nb):
    "Markdown of the notebook `nb` (a dict) and its pictures as {path: bytes}"
    parts,pics = [],{}
    for i,c in enumerate(nb['cells']):
        src = ''.join(c['source'])
        if c['cell_type'] == 'markdown': parts.append(relink(src))
        if c['cell_type'] != 'code': continue
        flags,code = directives(src)
        if 'hide' in flags or not code: continue
        if 'echo: false' not in flags: parts.append(f'```python\n{code}\n```')
        for j,o in enumerate([] if 'output: false' in flags else c['outputs']):
            md,files = output(o, f'index_files/cell-{i}-{j}')
            parts.append(md); pics.update(files)
    note = '<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook. -->'
    return '\n\n'.join([note, *(o.strip() for o in parts)]) + '\n', pics

def render_index():
    "README.md and all that it shows, as {path: bytes}"
    md,pics = render(json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8')))
    return {'README.md': md.encode(), **pics}

if __name__ == '__main__':
    new = render_index()
    for f in (root/'index_files').glob('*'):
        if f'index_files/{f.name}' not in new: f.unlink()
    for name,data in new.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
    print(f'README.md: {len(new["README.md"])} bytes, {len(new)-1} pictures')
