"""Looking through the real command line at drawn images and a clip encoded here: what is shown is what the model sees."""

from __future__ import annotations

import os
import struct
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import dino
from dino import weights
from dino.cli import main
from dino.data.decode import decode
from dino.features.layout import lay_out
from dino.look.attention import map_attention
from dino.look.commands import distinguish_names
from dino.look.patches import match_mutual, prepare_image
from dino.look.pictures import Look
from dino.look.video import Clip, Frame, thin_out, write_video
from drawing import draw_square, encode_clip
from helpers import draw_images, run_dino

HEADS = 3


@pytest.fixture(scope="module")
def model(saved_model):
    return dino.load(saved_model)


def said(capsys, *arguments: object, code: int = 2) -> str:
    """What a refused command says: one sentence."""
    assert main([*map(str, arguments)]) == code
    found = capsys.readouterr().err.strip()
    assert found.startswith("dino: ")
    assert "\n" not in found
    return found


# --- attention -----------------------------------------------------------------------------------------------------


def test_attention_of_a_folder_shows_each_image_in_its_aspect(saved_model, tmp_path):
    for name, (height, width) in {"wide": (40, 90), "tall": (70, 50), "odd": (33, 47)}.items():
        draw_square(tmp_path / "images" / f"{name}.png", height, width)
    done = run_dino("attention", saved_model, tmp_path / "images", "--out", tmp_path / "out", "--panel")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attention.png") == 3
    shapes = {p.name: decode(p).shape[1::-1] for p in (tmp_path / "out").iterdir()}
    assert len(shapes) == 3 * (1 + HEADS) + 1
    # The shorter side is 64; the longer is 144, 89.6 or 91.2, cut down to whole patches of 8.
    sizes = [shapes[f"{name}-head0.png"] for name in ("wide", "tall", "odd")]
    assert sizes == [(144, 64), (64, 88), (88, 64)]
    assert shapes["wide-attention.png"][0] > (HEADS + 2) * 144
    edge = 3 * 64  # small pictures of a figure are shown larger
    assert 3 * edge < shapes["panel.png"][1] < 4 * edge
    assert (HEADS + 2) * edge < shapes["panel.png"][0] < (HEADS + 3) * edge


def test_pictures_have_the_size_of_the_photograph(saved_model, model, tmp_path):
    path = draw_square(tmp_path / "a.png", 200, 310)
    photo = decode(path)
    look = dino.attention_maps(model, path, 64)
    assert look.image.shape == (64, 96, 3)  # 64 x 99.2 in whole patches
    assert np.array_equal(look.photo, photo[:, 5:305])
    assert {picture.shape for picture in [*look.heated, *look.overlays]} == {(200, 300, 3)}
    (colored,) = dino.pca_colors(model, [path], 64)
    assert colored.picture.shape == (200, 300, 3)
    found = dino.match_patches(model, path, path, 64)
    assert found.figure().size == (2 * 300 + 6, 200)
    gap = np.asarray(found.figure(1))[:, 300:306]
    level = found.points[0, 0, 1] * 200 / 64  # of the one line
    assert abs(np.flatnonzero((gap != 255).any(axis=(1, 2))).mean() - level) < 1
    assert main(["attention", str(saved_model), str(path), "--size", "64", "--out", str(tmp_path / "out")]) == 0
    assert np.array_equal(decode(tmp_path / "out" / "a-head1.png"), look.heated[1])
    assert torch.equal(dino.attention_maps(saved_model, path, 64).attention, look.attention)
    assert np.array_equal(dino.match_patches(saved_model, path, path, 64).points, found.points)
    with pytest.raises(ValueError, match="there are no images"):
        list(dino.pca_colors(model, []))
    assert torch.equal(dino.attention_maps(model, Image.fromarray(photo), 64).attention, look.attention)
    assert np.array_equal(next(dino.pca_colors(model, str(path), 64)).picture, colored.picture)
    with pytest.raises(ValueError, match=r"list .* is no picture; give one path"):
        dino.attention_maps(model, [path], 64)
    small = dino.attention_maps(model, photo[:40, :40], 64)  # smaller than what the model sees
    assert np.array_equal(small.photo, small.image)


def test_maps_are_stretched_and_say_their_range(model):
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    look = dino.attention_maps(model, image, 32)
    assert [drawn.sum(axis=2, dtype=int).min() for drawn in look.maps] == [4] * (HEADS + 1)  # the darkest of all colors
    assert [drawn[..., 0].max() for drawn in look.maps] == [252] * (HEADS + 1)  # and the brightest
    least, most = (100 * float(value) for value in (look.attention[0].min(), look.attention[0].max()))
    assert look.ranges[0] == f"{least:.2g} to {most:.2g} %"


def test_a_figure_of_many_heads_has_several_rows():
    photo = np.zeros((32, 32, 3), np.uint8)
    few, many = (Look(photo, torch.rand(heads, 4, 4), 0.6, photo).figure().size for heads in (9, 17))
    assert many[0] == few[0]
    assert 1.8 < many[1] / few[1] < 2.1


def test_a_panel_of_many_images_has_pages(saved_model, tmp_path):
    folder = draw_images(tmp_path / "images", 12)
    flags = ["--out", str(tmp_path / "out"), "--size", "16", "--panel"]
    assert main(["attention", str(saved_model), str(folder), *flags]) == 0
    heights = [decode(tmp_path / "out" / f"panel-{page}.png").shape[0] for page in (1, 2)]
    assert 4 < heights[0] / heights[1] < 5.5  # 10 images and 2
    assert not (tmp_path / "out" / "panel.png").exists()


def test_finer_patches_are_centered_where_coarse_ones_are(model):
    finer = dino.finer_patches(model, 4)
    image = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    assert map_attention(finer, prepare_image(finer, image)).shape == (1, HEADS, 12, 16)
    assert model.patch_size == 8
    assert map_attention(model, prepare_image(model, image)).shape == (1, HEADS, 6, 8)
    assert dino.attention_maps(finer, image, 48).attention.shape == (HEADS + 1, 12, 16)
    images = torch.randn(1, 3, 32, 32)
    embedded = finer.patch_embed(images).view(8, 8, -1)
    # The patch of row 1, column 2 begins 2 pixels before the square of 4 pixels that it is centered on.
    window = images[:, :, 2:10, 6:14]
    torch.testing.assert_close(embedded[1, 2], model.patch_embed(window)[0, 0], atol=1e-5, rtol=0)


def test_stride_from_the_command_line(saved_model, tmp_path, capsys):
    Image.new("RGB", (88, 64), "gray").save(image := tmp_path / "a.png")  # only the maps have edges
    for stride, cell in ((None, 8), (4, 4)):
        flags = [] if stride is None else ["--stride", str(stride)]
        out = tmp_path / f"out{cell}"
        assert main(["attention", str(saved_model), str(image), "--out", str(out), *flags]) == 0
        picture = decode(out / "a-head0.png").astype(int)
        changes = np.flatnonzero(np.abs(np.diff(picture, axis=1)).sum(axis=(0, 2)))
        assert set((changes + 1) % cell) == {0}
        assert len(changes) > picture.shape[1] // cell * 0.8
    assert "--stride is 3" in said(capsys, "attention", saved_model, image, "--stride", 3)


def test_colliding_names_are_told_apart():
    assert distinguish_names(["/a/x.jpg", "/a/y.jpg"]) == ["x", "y"]
    assert distinguish_names(["/a/x.jpg", "/b/x.jpg", "/b/y.png"]) == ["a-x", "b-x", "y"]
    assert distinguish_names(["/a/x.jpg", "/a/X.png"]) == ["x.jpg", "X.png"]
    tricky = ["/r/a/x.jpg", "/r/a-x.jpg", "/r/b/x.jpg", "/r/b/x.png", "/r/b-x.jpg.jpg"]
    assert len({name.lower() for name in distinguish_names(tricky)}) == len(tricky)


@pytest.mark.parametrize("command", ["attention", "pca"])
def test_a_bad_image_in_a_folder_is_skipped_and_named(saved_model, tmp_path, capsys, command):
    folder = draw_images(tmp_path / "images", 2)
    (folder / "class0" / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (5, 5)).save(folder / "small.png")
    assert main([command, str(saved_model), str(folder), str(folder / "class0"), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob(f"*-{command}.png"))) == 2
    found = capsys.readouterr().err
    assert found.count("broken.jpg") == 1
    assert found.count("5 x 5 pixels") == 1


# --- patch features ------------------------------------------------------------------------------------------------


def test_colors_share_one_basis_and_follow_the_features(model):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 255, (32, 32, 3), np.uint8) for _ in range(2))
    first, second, again = (shown.colors for shown in dino.pca_colors(model, [a, b, a], 32))
    assert first.shape == (4, 4, 3)
    assert np.array_equal(first, again)
    assert not np.allclose(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    assert np.stack([first, second]).std(axis=(0, 1, 2)).min() > 0.05
    swapped = [shown.colors for shown in dino.pca_colors(model, [b, a, a], 32)]
    np.testing.assert_allclose(swapped[1], first, atol=2e-3)
    (one_patch,) = dino.pca_colors(model, [a[:8, :8]], 8)
    assert one_patch.colors.shape == (1, 1, 3)
    assert np.isfinite(one_patch.colors).all()


def test_pca_of_a_folder_is_drawn_as_the_function_says(saved_model, model, tmp_path):
    paths = [str(draw_square(tmp_path / "images" / f"{i}.png", seed=i)) for i in range(3)]
    assert main(["pca", str(saved_model), str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 0
    for path, shown in zip(paths, dino.pca_colors(model, paths), strict=True):
        written = tmp_path / "out" / f"{Path(path).stem}-pca.png"
        assert np.array_equal(decode(written), np.asarray(shown.figure()))
        assert np.array_equal(shown.picture[4::8, 4::8], (255 * shown.colors + 0.5).astype(np.uint8))


def test_a_convnet_has_colors_and_matches_but_no_attention(tmp_path, capsys):
    arguments = {"arch": "timm:resnet18", "image_size": 64}
    (tmp_path / "net").mkdir()
    weights.save(tmp_path / "net", dino.create(**arguments), arguments)
    image = draw_square(tmp_path / "a.png", 130, 160)
    for *command, out in (["pca", tmp_path / "net", image, "out"], ["match", tmp_path / "net", image, image, "m.png"]):
        assert main([*map(str, command), "--out", str(tmp_path / out)]) == 0
    for command in ("attention", "video"):
        assert "no attention maps" in said(capsys, command, tmp_path / "net", image, "--out", tmp_path / "x.mp4")
    with pytest.raises(ValueError, match="no attention maps"):
        dino.attention_maps(dino.create("timm:resnet18"), image)


def test_mutual_nearest_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.9, 0.1]])
    b = torch.tensor([[0.0, 1.0], [3.0, 0.0], [-1.0, 0.0]])
    pairs, cosine = match_mutual(a, b)
    assert pairs.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(cosine, torch.ones(2))
    big, order = torch.randn(5000, 8), torch.randperm(5000)  # more than are compared at a time
    assert torch.equal(match_mutual(big, big[order])[0][:, 0].sort().values, torch.arange(5000))
    assert all(order[j] == i for i, j in match_mutual(big, big[order])[0][:50].tolist())


def test_matches_of_an_image_with_itself_are_its_own_patches(saved_model, model, tmp_path, capsys):
    image = draw_square(tmp_path / "a.png")
    found = dino.match_patches(model, image, image, 40)
    assert len(found.points) == 5 * 7
    assert np.array_equal(found.points[:, 0], found.points[:, 1])
    assert sorted(map(tuple, found.points[:, 0]))[:2] == [(4, 4), (4, 12)]
    np.testing.assert_allclose(found.cosine, 1, atol=1e-5)
    out = tmp_path / "m.png"
    assert main(["match", str(saved_model), str(image), str(image), "--out", str(out), "--lines", "9"]) == 0
    assert "9 of 88 mutual nearest neighbors" in capsys.readouterr().out
    assert decode(out).shape == (64, 2 * 88 + 6, 3)
    gap = np.asarray(found.figure(1))[:, 56:62]  # crossed by the one line, which is level
    assert np.flatnonzero((gap != 255).any(axis=(1, 2))).tolist() == [found.points[0, 0, 1]]


# --- video ---------------------------------------------------------------------------------------------------------


def probe(path: Path) -> tuple[list[float], np.ndarray]:
    """Times and pixels of a clip's frames, read here, which must be what every browser plays."""
    with av.open(str(path)) as container:
        (stream,) = container.streams  # no sound
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        head = path.read_bytes()
        assert head.index(b"moov") < head.index(b"mdat")  # plays while it loads
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    return [time for time, _ in frames], np.stack([pixels for _, pixels in frames])


def test_attention_over_a_clip_keeps_its_times_and_shows_its_frames(saved_model, model, tmp_path):
    times = [0.0, 0.1, 0.2, 0.5, 0.6]  # phones skip frames
    clip = encode_clip(tmp_path / "clip.mp4", times)
    done = run_dino("video", saved_model, clip, "--size", 48, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "clip-attention.mp4: 5 frames" in done.stdout
    found, frames = probe(tmp_path / "clip-attention.mp4")
    np.testing.assert_allclose(found, times, atol=1e-3)
    assert frames.shape == (5, 48, 128, 3)
    for i, frame in enumerate(frames):
        assert frame[24, 8 * i + 8].min() > 190
        assert frame[40, 30].max() < 60
    pictures = [np.asarray(picture.pixels) for _, picture in dino.video_frames(model, str(clip), size=48)]
    assert np.abs(frames[:, :, 64:].astype(int) - np.stack(pictures)).mean() < 8
    look = dino.attention_maps(model, next(iter(Clip(str(clip)))).pixels, 48)
    assert np.array_equal(pictures[0], look.heated[-1])


@pytest.mark.parametrize("show", ["mask", "pca"])
@pytest.mark.parametrize("suffix", [".gif", ".mkv", ""])
def test_kinds_of_clips_and_pictures(saved_model, tmp_path, show, suffix):
    clip = tmp_path / f"clip{suffix}"
    if suffix:
        encode_clip(clip, [0.0, 0.2, 0.4, 0.6])
    else:  # frames of a folder, whose numbers have no leading zeros
        for i in (8, 9, 10, 11):
            draw_square(clip / f"f{i}.png", 48, 64, (16, i - 8))
    flags = ["--size", "40", "--alone", "--show", show, "--fps", "5", "--out", str(tmp_path / "o.mp4")]
    assert main(["video", str(saved_model), str(clip), *flags, *(["--head", "1"] if show == "mask" else [])]) == 0
    times, frames = probe(tmp_path / "o.mp4")
    np.testing.assert_allclose(times, [0, 0.2, 0.4, 0.6], atol=1e-3)
    assert frames.shape == (4, 48, 58, 3)  # 40 x 48 of the 40 x 53.3 pixels that the model sees are whole patches
    assert np.abs(np.diff(frames.astype(int), axis=0)).max(axis=(1, 2, 3)).min() > 20


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path, capsys):
    for i in (1, 2, 10, 100):
        Image.new("L", (8, 8), i).save(tmp_path / f"shot-{i}.png")
    (tmp_path / "shot-20.png").write_bytes(b"no image")
    clip = Clip(str(tmp_path), fps=10)
    assert [(frame.seconds, int(frame.pixels[0, 0, 0])) for frame in clip] == [(0, 1), (0.1, 2), (0.2, 10), (0.4, 100)]
    assert "Skipped shot-20.png" in capsys.readouterr().err
    assert thin_out(iter(range(100)), 8) == [0, 16, 32, 48, 64, 80, 96]
    assert thin_out(range(5), 8) == [0, 1, 2, 3, 4]
    Image.new("L", (8, 9)).save(tmp_path / "shot-101.png")
    with pytest.raises(ValueError, match="frames of 8 x 8 and 8 x 9 pixels"):
        list(Clip(str(tmp_path)))


def test_clips_that_were_filmed_sideways_are_turned(tmp_path):
    clip = encode_clip(tmp_path / "clip.mp4", [0.0, 0.1])
    data, one = clip.read_bytes(), 2**16
    upright, turned = (struct.pack(">9i", *m, 0, 0, 2**30) for m in ((one, 0, 0, 0, one, 0), (0, one, 0, -one, 0, 0)))
    at = data.index(upright, data.index(b"tkhd"))  # the picture's matrix, as a phone held upright writes it
    clip.write_bytes(data[:at] + turned + data[at + len(turned) :])
    _, frame = Clip(clip)
    assert frame.pixels.shape == (64, 48, 3)
    bright = frame.pixels.min(axis=2) > 150
    assert [(w.min(), w.max() + 1) for w in np.nonzero(bright)] == [(8, 24), (16, 32)]


@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_damaged_clip_is_shown_as_far_as_it_goes(saved_model, tmp_path, capsys, damage):
    clip = encode_clip(
        tmp_path / ("clip.mkv" if damage == "cut off" else "clip.mp4"), [i / 10 for i in range(20)], 240, 320
    )
    data = clip.read_bytes()
    if damage == "cut off":
        clip.write_bytes(data[: len(data) * 9 // 10])
    else:
        middle = data.index(b"moov") * 7 // 10
        clip.write_bytes(data[:middle] + b"\xff" * 50 + data[middle + 50 :])
    assert main(["video", str(saved_model), str(clip), "--size", "48", "--out", str(tmp_path / "o.mp4")]) == 0
    assert 3 < len(probe(tmp_path / "o.mp4")[0]) < 20
    assert ("clip.mp4 cannot be read beyond" in capsys.readouterr().err) == (damage == "overwritten")


def test_odd_sizes_are_made_even_and_a_failure_leaves_nothing(tmp_path):
    frames = [Frame(i / 10, np.full((15, 21, 3), 40 * i, np.uint8)) for i in range(3)]
    assert write_video(tmp_path / "odd.mp4", frames) == 3
    assert probe(tmp_path / "odd.mp4")[1].shape == (3, 14, 20, 3)

    def failing():
        yield frames[0]
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        write_video(tmp_path / "failed.mp4", failing())
    assert [path.name for path in tmp_path.iterdir()] == ["odd.mp4"]


# --- figures -------------------------------------------------------------------------------------------------------


def test_neighbors_agree_with_the_evaluation(saved_model, photos, tmp_path):
    page = tmp_path / "n.html"
    done = run_dino("figure", "neighbors", saved_model, "--data", photos, "--val", photos, "--out", page, "--rows", 3)
    assert done.returncode == 0, done.stderr
    judged = run_dino("eval", "knn", saved_model, "--data", photos, "--val", photos, "--k", 20)
    (accuracy,) = (line.split()[1] for line in judged.stdout.splitlines() if line.startswith("knn20_top1"))
    assert f"{float(accuracy):.1f} % of 24 queries right" in done.stdout
    text = page.read_text()
    right = round(float(accuracy) * 24 / 100)
    assert f"Right: {right} of 24" in text
    assert f"Wrong: {24 - right} of 24" in text
    rows = min(3, right) + min(3, 24 - right)
    assert text.count('class="row seven"') == rows
    assert text.count("<img") == 7 * rows
    assert "http" not in text.replace("http://www.w3.org", "")


def test_class_map_puts_like_classes_together(saved_model, photos, tmp_path, capsys):
    from dino.look.figures import average_classes

    centers = torch.nn.functional.one_hot(torch.arange(12) // 4, 8).float()  # three groups of four classes
    labels = torch.arange(12).repeat_interleave(5)
    means, classes = average_classes(centers[labels] + 0.1 * torch.randn(60, 8), labels, 13)
    points = lay_out(means)
    assert classes.tolist() == list(range(12))
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(12)
    assert (distance.argmin(axis=1) // 4 == np.arange(12) // 4).all()
    for name, show, words in (
        ("a.png", "means", "3 classes, the means of 24 images"),
        ("b.svg", "points", "24 images of 3 classes"),
        ("c.png", "images", "24 images of 3 classes"),
    ):
        flags = ["--data", str(photos), "--show", show, "--out", str(tmp_path / name)]
        assert main(["figure", "tsne", str(saved_model), *flags]) == 0
        assert words in capsys.readouterr().out
    drawn = [decode(tmp_path / name) for name in ("a.png", "c.png")]
    assert drawn[1].std() > drawn[0].std() > 1
    legend = (tmp_path / "b.svg").read_text()
    assert all(f"<!-- class{i} -->" in legend for i in range(3))
    draw_images(tmp_path / "two", classes=2)
    said_of = said(capsys, "figure", "tsne", saved_model, "--data", tmp_path / "two", "--show", "means")
    assert "a map needs at least 3 classes, but there are 2" in said_of


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    (root / "broken.jpg").write_bytes(b"no image")
    (root / "broken.mp4").write_bytes(b"no video")
    for name in ("a.jpg", "b.jpg"):
        (root / "folder").mkdir(exist_ok=True)
        (root / "folder" / name).write_bytes(b"no image")
    (root / "empty").mkdir()
    (root / "folder.png").mkdir()
    for name, edges in (("small", (5, 5)), ("long", (6400, 40)), ("good", (40, 40))):
        Image.new("RGB", edges).save(root / f"{name}.png")
    with wave.open(str(root / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1000))
    encode_clip(root / "small.mkv", [0, 0.1], 6, 6)
    encode_clip(root / "clip.mp4", [0, 0.1])
    encode_clip(root / "none.mkv", [])
    return root


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("attention nowhere.jpg", "no image 'nowhere.jpg'"),
        ("attention broken.jpg", "broken.jpg cannot be shown: not an image"),
        ("pca small.png", "5 x 5 pixels, smaller than one patch of 8"),
        ("attention long.png --size 512", "use a smaller --size"),
        ("attention good.png --out broken.jpg", "--out broken.jpg/NAME.png cannot be written"),
        ("attention good.png --out broken.jpg/below", "cannot be written"),
        ("pca good.png --size 4", "--size is 4, not a multiple of the patch size 8; use 8"),
        ("attention good.png --mass 1.5", "mass is 1.5"),
        ("attention good.png --stride 8", "--stride is 8; it must be less than the patch size 8 by an even number"),
        ("attention folder", "none of 2 images can be shown"),
        ("pca folder", "none of 2 images can be shown"),
        ("attention empty", "holds no files"),
        ("match good.png small.png", "small.png cannot be shown: it is 5 x 5 pixels"),
        ("match good.png good.png --out good.png", "--out good.png is the input itself"),
        ("match good.png good.png --out folder.png", "it is a folder"),
        ("match good.png good.png --out m.what", "--out is m.what; choose a name that ends in .png or .jpg or .webp"),
        ("video nowhere.mp4", "nowhere.mp4 cannot be read as a video (No such file or directory)"),
        ("video broken.mp4", "broken.mp4 cannot be read as a video"),
        ("video sound.wav", "sound.wav holds no video, only"),
        ("video none.mkv", "none.mkv"),
        ("video folder", "folder holds no frame that can be read"),
        ("video empty", "holds no files"),
        ("video small.mkv", "6 x 6 pixels, smaller than one patch of 8"),
        ("video clip.mp4 --out clip.mp4", "--out clip.mp4 is the input itself"),
        ("video clip.mp4 --out o.gif", "--out is o.gif; choose a name that ends in .mp4"),
        ("video clip.mp4 --out /proc/o.mp4", "--out /proc/o.mp4 cannot be written"),
        ("video clip.mp4 --head 3", "--head is 3; this model has heads 0 to 2"),
        ("video folder --fps 0", "fps is 0.0"),
        ("figure tsne --data empty", "holds no files"),
        ("figure neighbors --data folder", "no image of"),
    ],
)
def test_bad_input_is_one_sentence(saved_model, bad, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(bad)
    before = {path: path.stat().st_mtime_ns for path in bad.rglob("*") if path.is_file()}
    words_of = arguments.split()
    command = words_of[: 2 if words_of[0] == "figure" else 1]
    assert main([*command, str(saved_model), *words_of[len(command) :]]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("Skipped ") for line in lines[:-1])
    assert words in lines[-1]
    assert {path: path.stat().st_mtime_ns for path in bad.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("package", "command", "extra"), [("av", "video good.png", "video"), ("sklearn", "figure tsne --data .", "figures")]
)
def test_a_missing_package_names_its_extra(saved_model, photos, tmp_path, package, command, extra):
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / f"{package}.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path / "block"), os.environ.get("PYTHONPATH", "")])
    *words, last = command.replace("--data .", f"--data {photos}").split()
    at = 2 if words[0] == "figure" else 1
    arguments = [*words[:at], saved_model, *words[at:], last]
    done = run_dino(*arguments, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path)
    assert done.returncode == 2
    assert f"pip install 'dino-vision[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1
