"""Links of pages to files outside docs/ lead to the repository on the site that mkdocs builds."""

import re
from pathlib import Path

OUTSIDE = re.compile(r"\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page, config, **_) -> str:
    folder = Path(page.file.abs_src_path).parent
    root = Path(config.docs_dir).parent

    def to_repository(link: re.Match) -> str:
        file = (folder / link[1]).resolve()
        if not file.exists():  # left as it is: mkdocs then names the page and the link
            return link[0]
        return f"]({config.repo_url}/blob/main/{file.relative_to(root)})"

    return OUTSIDE.sub(to_repository, markdown)
