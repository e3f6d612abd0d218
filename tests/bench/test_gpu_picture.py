"""The picture of the two residencies: it is drawn, and nothing of it is cut off."""

import pytest

picture = pytest.importorskip("bench.gpu.picture", reason="needs matplotlib", exc_type=ImportError)


def test_nothing_outside_the_picture(tmp_path, capsys):
    figure = picture.draw()
    figure.canvas.draw()
    words = [t for t in figure.findobj(picture.matplotlib.text.Text) if t.get_text() and t.get_visible()]
    drawn = [t for t in words if t.axes is None or t.axes.axison is False]
    assert len(drawn) > 20
    boxes = [t.get_window_extent() for t in drawn]
    for t, extent in zip(drawn, boxes):
        assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1, t.get_text()
        assert figure.bbox.y0 <= extent.y0 and extent.y1 <= figure.bbox.y1, t.get_text()
    picture.plt.close(figure)
    path = tmp_path / "picture.png"
    assert picture.main([str(path)]) == 0 and path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{path}\n"


def test_the_committed_picture_is_there():
    assert picture.FILE.read_bytes().startswith(b"\x89PNG")
