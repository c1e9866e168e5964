"""Configuration of the documentation, which is built offline: ``python -m sphinx -W -b html docs out/docs``."""

from __future__ import annotations

import importlib
import pathlib
import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject, PyXRefRole
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util import inspect
from sphinx.util.nodes import make_refnode
from sphinx.writers.html5 import HTML5Translator

import conv3dt_jax

DOCS = pathlib.Path(__file__).parent

project = "conv3dt_jax"
author = "The conv3dt_jax authors"
project_copyright = "The conv3dt_jax authors"
version = release = conv3dt_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["**.ipynb_checkpoints"]
nitpicky = True
default_role = "name"

# Pages: MyST Markdown. Formulas become MathML, so that no page needs a script for them.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
html_math_renderer = "mathml"
myst_heading_anchors = 3

# Notebooks are shown as they are stored; a page that says so in its front matter runs when it is built.
nb_execution_mode = "off"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}

# The reference: docstrings in Google's style, signatures a parameter a line.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_type_aliases = {
    name: name for name in ("ArrayLike", "DTypeLike", "Identifier", "Implementation", "Names", "lax.PrecisionLike")
}
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = f"conv3dt_jax {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = True
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {
    "home_page_in_toc": False,
    "navbar_persistent": [],
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "use_repository_button": False,
}

PUBLIC_MODULES = ("constraints", "initializers", "interop", "lax", "nnx", "regularizers")
"""The submodules that are public, each with its own list of public names."""

PRIVATE = ("conv3dt_jax.linen.Layer",)
"""What signatures name and no page has: the base of both layers."""


def copy_notebooks(source: pathlib.Path = DOCS.parent / "notebooks", target: pathlib.Path = DOCS / "notebooks") -> None:
    """Brings the notebooks and the pictures beside them under the documentation, where git ignores them."""
    target.mkdir(exist_ok=True)
    wanted = {path.name: path.read_bytes() for path in source.glob("*") if path.suffix in (".ipynb", ".png")}
    for path in target.iterdir():
        if path.is_file() and path.name not in wanted:
            path.unlink()
    for name, content in wanted.items():
        path = target / name
        if not path.exists() or path.read_bytes() != content:  # an unchanged one is not read anew
            path.write_bytes(content)


copy_notebooks()


class NameRole(PyXRefRole):
    """What docstrings put in single backticks: a name of ours as a link, all else (`.keras`, `jax.jit`) as code."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        self.name = "py:obj"
        if re.fullmatch(r"[A-Za-z_][\w.]*", self.text):
            return super().run()
        return [nodes.literal(self.rawtext, self.text)], []


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Node) -> nodes.Node | None:
    """Names without their module, where one object of ours has it; what is not ours is shown as code, without a link.

    What remains is a name in this package that does not exist, of which Sphinx warns.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    objects = env.get_domain("py").objects
    found = [name for name, entry in objects.items() if name.endswith(f".{target}") and not entry.aliased]
    if len(found) > 1:  # that of the module at hand, or of the package itself
        found = [name for name in found if name in (f"{node.get('py:module')}.{target}", f"conv3dt_jax.{target}")][:1]
    if found:
        entry = objects[found[0]]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, found[0])
    return text if not target.startswith("conv3dt_jax") or target in PRIVATE else None


def check_that_all_is_documented(app: Sphinx, env: BuildEnvironment) -> None:
    """Every public name has its place in the reference; Sphinx itself warns of a second one."""
    objects = env.get_domain("py").objects
    public = {f"conv3dt_jax.{name}" for name in conv3dt_jax.__all__}
    for module in PUBLIC_MODULES:
        public |= {f"conv3dt_jax.{module}.{name}" for name in importlib.import_module(f"conv3dt_jax.{module}").__all__}
    missing = sorted(public - set(objects))
    if missing:
        raise ExtensionError(f"no page documents {', '.join(missing)}")


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Signatures as they are written: types by their names, defaults as code, nothing that Linen adds for itself."""
    if what == "class" and (signature or "").startswith("(*args"):  # the metaclass of NNX
        found = inspect.signature(obj.__init__, bound_method=True, type_aliases=autodoc_type_aliases)
        signature = inspect.stringify_signature(found, show_return_annotation=False, unqualified_typehints=True)
    if signature is not None:
        signature = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature)
        signature = signature.replace("<class 'jax.numpy.float32'>", "jnp.float32")
        signature = re.sub(
            r", parent: [^=]*= <flax[^>]*>, name: str \| None = None\)", ", name: str | None = None)", signature
        )
        signature = signature.replace("mappingproxy({})", "{}")
    return signature, result


def keep_returns(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon for a type, but ours are sentences: an empty first line keeps them."""
    for index in reversed([index for index, line in enumerate(lines) if line.strip() == "Returns:"]):
        first = lines[index + 1]
        lines.insert(index + 1, first[: len(first) - len(first.lstrip())] + "\\")


def visit_math(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """A formula as MathML, by docutils."""
    text = re.sub(r"\\mathrel\{(.*?)\}", r"\1", node.astext()).replace(r"\dots", r"\ldots")
    block = isinstance(node, nodes.math_block)
    formula = "".join(tex2mathml(text, as_block=block))
    translator.body.append(f'<div class="formula">{formula}</div>\n' if block else formula)
    raise nodes.SkipNode


def mend_links_to_docs(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Pages of source know one name of their module alone, the public one: what has none is linked by its own."""
    if pagename.startswith("_modules/") and "body" in context:
        objects, module = app.env.get_domain("py").objects, pagename.removeprefix("_modules/").replace("/", ".")

        def mended(match: re.Match[str]) -> str:
            own = f"{module}.{match[1].rpartition('.')[2]}"
            return f"#{own}" if match[1] not in objects and own in objects else match[0]

        context["body"] = re.sub(r'#(conv3dt_jax\.[\w.]+)(?=")', mended, context["body"])


def setup(app: Sphinx) -> None:
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_role("name", NameRole())
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None))
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", keep_returns, priority=400)  # before Napoleon
    app.connect("missing-reference", resolve)
    app.connect("html-page-context", mend_links_to_docs)
    app.connect("env-check-consistency", check_that_all_is_documented)
