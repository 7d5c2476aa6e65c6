"""The page holds its plots itself, and words cannot become markup."""

import base64
import re

from matplotlib.figure import Figure

from common.report import Report


def test_page_is_one_file_with_everything(tmp_path):
    page = Report(tmp_path, "A <run>")
    page.text("2 < 3 & 4")
    page.table(["name", "value"], [("<b>", 0.123456), ("count", 7)])
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    path = page.figure(figure, "curve", 'a "curve"')
    html = page.write().read_text()
    assert path == tmp_path / "curve.png" and path.read_bytes().startswith(b"\x89PNG")
    assert base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1)) == path.read_bytes()
    assert "A &lt;run&gt;" in html and "2 &lt; 3 &amp; 4" in html and "<td>&lt;b&gt;</td>" in html
    assert "<td>0.1235</td>" in html and "<td>7</td>" in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.png", "report.html"]
