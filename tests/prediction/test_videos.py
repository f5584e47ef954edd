"""Videos: each frame once, in order, with its time; damage is named."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

pytest.importorskip("av", reason="PyAV is not installed")

from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files
from spatial_mamba_d2.prediction.videos import Video
from tests.prediction.films import HEIGHT, WIDTH, Reader, frame_of, number_of, write_video


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.mkv", "libx264"), ("a.mp4", "libx264"),
     ("a.mpg", "mpeg2video")],
)  # fmt: skip
def test_each_frame_once_and_in_order(tmp_path, name, codec):
    """libx264 has frames that are stored in another order than they are shown."""
    video = Video(write_video(tmp_path / name, codec=codec))
    assert len(video) == 60 and video.size == (HEIGHT, WIDTH)
    assert [number_of(video.read(i)) for i in range(60)] == list(range(60))
    assert video.times_s == pytest.approx(np.arange(60) / 25, abs=1e-3)
    assert [number_of(video.read(i)) for i in (7, 41, 3, 3)] == [7, 41, 3, 3]


def test_files_of_a_video(tmp_path):
    write_video(tmp_path / "film.mp4")
    model = Reader()
    options = Options(["csv"], batch_size=8)
    summary = predict_files([tmp_path], tmp_path / "out", Predictor(model), options)
    assert summary["images"] == 60 and summary["skipped"] == []
    assert model.numbers == list(range(60))
    with (tmp_path / "out/predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    assert [row["image"] for row in rows] == [
        (tmp_path / f"film.mp4/{i:06d}").as_posix() for i in range(60)
    ]
    times = [float(row["time_s"]) for row in rows]
    assert times == pytest.approx(np.arange(60) / 25, abs=1e-3)


def test_detections_in_frames(oracle, tmp_path):
    write_video(tmp_path / "film.mp4", 5)
    options = Options(["coco", "png", "labelme"], score_thresh=0)
    predict_files([tmp_path / "film.mp4"], tmp_path / "out", Predictor(oracle()), options)
    images = json.loads((tmp_path / "out/coco.json").read_text())["images"]
    assert [image["time_s"] for image in images] == pytest.approx([i / 25 for i in range(5)])
    assert images[3]["file_name"].endswith("film.mp4/000003")
    drawings = sorted(path.name for path in (tmp_path / "out/png/film.mp4").iterdir())
    assert drawings == [f"{i:06d}.png" for i in range(5)]


def test_shards_of_a_video_give_the_same_bytes(tmp_path):
    path = write_video(tmp_path / "film.mp4")
    options = {"formats": ["csv"], "batch_size": 7}
    predict_files([path], tmp_path / "one", Predictor(Reader()), Options(**options))
    for number in (2, 1, 3):
        shard = Options(**options, shard=(number, 3))
        predict_files([path], tmp_path / "three", Predictor(Reader()), shard)
    predict_files([path], tmp_path / "three", Predictor(Reader()), Options(**options, merge=True))
    first, second = (tmp_path / name / "predictions.csv" for name in ("one", "three"))
    assert first.read_bytes() == second.read_bytes()


def test_in_python(tmp_path):
    path = write_video(tmp_path / "film.mp4", 10)
    model = Reader()
    results = Predictor(model)(path, batch_size=4)
    first = next(results)
    assert first.source == path / "000000" and first.time_s == 0
    assert model.numbers == [0, 1, 2, 3]  # read when their turn comes
    assert [round(result.time_s * 25) for result in results] == list(range(1, 10))
    both = list(Predictor(Reader())([path, np.zeros((HEIGHT, WIDTH + 1, 3), np.uint8)]))
    assert len(both) == 11 and both[-1].source is None and both[-1].time_s is None


def test_a_video_that_is_cut_off(tmp_path):
    """What can be decoded is done; each frame that cannot is named, and so is a ruined file."""
    path = write_video(tmp_path / "film.mp4", 60, container_options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    (tmp_path / "ruin.mp4").write_bytes(content[:200])
    model = Reader()
    inputs = [path, tmp_path / "ruin.mp4"]
    summary = predict_files(inputs, tmp_path / "out", Predictor(model), Options(["csv"]))
    *frames, ruin = summary["skipped"]
    assert "video file" in ruin["reason"] and "ruin.mp4 cannot be decoded" in ruin["reason"]
    num_read = summary["images"]
    assert 30 < num_read < 60 and model.numbers[: num_read - 1] == list(range(num_read - 1))
    assert num_read + len(frames) in (60, num_read)  # named, or not in the file's packets


def test_a_video_whose_frames_change_their_size(tmp_path):
    """Frames of another size than the first one's are named, and the others are done."""
    content = [
        write_video(tmp_path / f"{height}.ts", 10, codec="mpeg2video", height=height).read_bytes()
        for height in (HEIGHT, 2 * HEIGHT)
    ]
    (tmp_path / "film.mpg").write_bytes(b"".join(content))
    model = Reader()
    summary = predict_files(
        [tmp_path / "film.mpg"], tmp_path / "out", Predictor(model), Options(["csv"])
    )
    assert summary["images"] >= 9 and model.numbers[:9] == list(range(9))
    assert len(summary["skipped"]) >= 9
    assert "must have frames of 48 x 96 pixels as its first one" in summary["skipped"][-1]["reason"]


def test_a_video_on_its_side(tmp_path):
    """Telephones store how they were held, as the matrix of the track in MP4 files."""
    path = write_video(tmp_path / "film.mp4", 3)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    quarter_turn = np.array([0, one, 0, -one, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    assert content[place : place + 4] == one.to_bytes(4, "big")
    content[place : place + 36] = quarter_turn
    path.write_bytes(content)
    video = Video(path)
    assert video.size == (WIDTH, HEIGHT)
    turned = np.rot90(frame_of(2), -1)  # clockwise
    assert np.abs(video.read(2).astype(int) - turned).mean() < 10


def test_bad_videos(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"video file .*text.mp4 cannot be decoded"):
        Video(tmp_path / "text.mp4")
    with pytest.raises(FileNotFoundError, match=r"no video file .*none.mp4"):
        Video(tmp_path / "none.mp4")
    model = Reader()
    model.num_channels = 4
    path = write_video(tmp_path / "film.mp4", 2)
    with pytest.raises(ValueError, match="has RGB frames, the model takes 4 channels"):
        predict_files([path], tmp_path / "out", Predictor(model), Options(["csv"]))


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    """The memory that Python's objects take, from the 100th frame to the last one."""
    import tracemalloc

    path = write_video(tmp_path / "film.mp4", 600)
    results = Predictor(Reader())(path, batch_size=4)
    tracemalloc.start()
    sizes = []
    for number, _ in enumerate(results):
        if number >= 100 and number % 100 == 99:
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert number == 599 and max(sizes) < 1.02 * min(sizes) + 20_000
