"""The logs of a run as one picture."""

from curves import draw_curves


def test_curves_show_once_what_a_killed_run_did_twice(tmp_path):
    rows = ["50,9,0.5", "100,18,0.4", "150,27,0.9", "100,19,0.4", "150,28,0.3"]
    for name, kept in (("killed", rows), ("whole", [rows[0], *rows[3:]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unet.csv").write_text("\n".join(["step,seconds,loss", *kept]))
        draw_curves([tmp_path / name / "unet.csv"], tmp_path / f"{name}.png")
    assert (tmp_path / "killed.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
