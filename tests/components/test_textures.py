"""Textures from folders and from nothing, and what is done to them."""

import pytest
import torch
from PIL import Image

from harness.contracts import AdgridError
from methods.components import augment, textures
from methods.components.augment import AUGMENTERS, augment_texture, hsv_to_rgb, jitter_colour, rgb_to_hsv
from methods.components.textures import PATTERNS, open_textures
from methods.components.warp import rotate_image


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient_texture(size=(24, 30)):
    return textures.GeneratedTextures().texture(size, seeded(11))


# --- sources -------------------------------------------------------------------------------------------------


def test_generated_textures_repeat_with_the_seed_and_differ_between_seeds():
    source = open_textures(None)
    assert source.name == "generated"
    first, again, other = (source.texture((32, 48), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generated_textures_are_structured_colour_images():
    source = open_textures(None)
    for seed in range(40):
        texture = source.texture((33, 48), seeded(seed))
        assert texture.shape == (3, 33, 48)
        assert texture.dtype == torch.float32
        assert texture.min() >= 0
        assert texture.max() <= 1
        assert texture.flatten(1).std(dim=1).max() > 0.02


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_fill_their_range(pattern):
    values = torch.stack([pattern((40, 24), seeded(seed)) for seed in range(20)])
    assert values.shape == (20, 40, 24)
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.amax() - values.amin() > 0.8


def test_cells_belong_to_their_nearest_point():
    # The same draws, pixel by pixel: number of points, points, values, kind.
    for seed in range(6):
        generator = seeded(seed)
        number = round(3 * 10 ** augment.draw_uniform(generator, 0, 1))
        points = torch.rand(2, number + 2, number + 2, generator=generator)
        values = torch.rand(number + 2, number + 2, generator=generator)
        flat = augment.draw_uniform(generator, 0, 1) < 0.5
        grid = torch.arange(number + 2)
        places = torch.stack([grid[:, None] + points[0], grid + points[1]], dim=2).flatten(0, 1)
        pattern = textures.cells((18, 18), seeded(seed))
        for row, column in ((0, 0), (17, 4), (9, 12)):
            here = torch.tensor([row + 0.5, column + 0.5]) * (number / 18) + 1
            distances = (places - here).norm(dim=1)
            expected = values.flatten()[distances.argmin()] if flat else distances.min().clamp(max=1)
            torch.testing.assert_close(pattern[row, column], expected, rtol=1e-4, atol=1e-5)


def test_a_folder_gives_its_images_squeezed_to_size(tmp_path):
    (tmp_path / "dtd" / "dotted").mkdir(parents=True)
    colours = {"a.jpg": (250, 10, 10), "dotted/b.PNG": (10, 250, 10), "dotted/c.jpeg": (10, 10, 250)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 20), colour).save(tmp_path / "dtd" / name)
    (tmp_path / "dtd" / "labels.txt").write_text("no image")
    (tmp_path / "dtd" / "._a.jpg").write_text("of another system")
    source = open_textures(str(tmp_path / "dtd"))
    assert source.name == "dtd, 3 images"
    seen = {int(source.texture((8, 12), seeded(seed)).flatten(1).mean(dim=1).argmax()) for seed in range(30)}
    assert seen == {0, 1, 2}
    texture = source.texture((8, 12), seeded(3))
    assert texture.shape == (3, 8, 12)
    assert texture.dtype == torch.float32
    assert sorted((texture.flatten(1).mean(dim=1) * 255).round().tolist()) == pytest.approx([10, 10, 250], abs=3)


def test_the_order_of_a_folder_is_that_of_its_names(tmp_path):
    for name in ("b.png", "a.png", "z/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = [path.relative_to(tmp_path).as_posix() for path in open_textures(str(tmp_path)).paths]
    assert found == ["a.png", "b.png", "z/a.png"]


def test_a_missing_an_empty_and_a_broken_folder_are_named(tmp_path):
    with pytest.raises(AdgridError, match=r"no folder .*nowhere; name a folder"):
        open_textures(str(tmp_path / "nowhere"))
    with pytest.raises(AdgridError, match=f"no image under {tmp_path}.*null for generated"):
        open_textures(str(tmp_path))
    (tmp_path / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    source = open_textures(str(tmp_path))
    with pytest.raises(AdgridError, match=r"half\.jpg cannot be read .*remove or replace it"):
        source.texture((8, 8), seeded())


# --- changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmenter", AUGMENTERS)
def test_every_augmenter_gives_an_image_and_some_change(augmenter):
    texture = gradient_texture()
    before = texture.clone()
    results = [augmenter(texture, seeded(seed)).clamp(0, 1) for seed in range(8)]
    assert torch.equal(texture, before)
    assert all(result.shape == texture.shape and result.isfinite().all() for result in results)
    assert any((result - texture).abs().max() > 0.02 for result in results)


@pytest.mark.parametrize("augmenter", AUGMENTERS)
def test_lower_precision_of_a_network_does_not_reach_textures(augmenter):
    for seed in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            lower = augmenter(gradient_texture(), seeded(seed))
        assert torch.equal(lower, augmenter(gradient_texture(), seeded(seed)))


def test_sharpness_by_hand():
    texture = torch.zeros(3, 5, 5)
    texture[:, 2, 2] = 1.0
    generator = seeded()
    factor = augment.draw_uniform(seeded(), 0, 2)
    changed = augment.change_sharpness(texture, generator)
    assert changed[0, 2, 2] == pytest.approx(5 / 13 + factor * 8 / 13)
    assert changed[0, 1, 2] == pytest.approx((1 - factor) / 13)
    assert changed[0, 0, 0] == 0


def test_three_different_augmenters_are_applied(monkeypatch):
    used = []

    def recorder(index):
        return lambda texture, generator: used.append(index) or texture

    monkeypatch.setattr(augment, "AUGMENTERS", tuple(recorder(index) for index in range(10)))
    for seed in range(60):
        augment_texture(gradient_texture(), seeded(seed))
        assert len(used) == 3 * (seed + 1)
        assert len(set(used[-3:])) == 3
    assert set(used) == set(range(10))


def test_augmented_textures_repeat_and_stay_in_range():
    texture = gradient_texture()
    for seed in range(30):
        result = augment_texture(texture, seeded(seed))
        assert torch.equal(result, augment_texture(texture, seeded(seed)))
        assert result.min() >= 0
        assert result.max() <= 1


def test_posterised_values_by_hand():
    texture = (torch.tensor([0, 37, 128, 200, 255]) / 255).expand(3, 1, 5)
    expected = {
        2**k: [value // 2**k * 2**k for value in (0, 37, 128, 200, 255)] for k in range(8)
    }  # the lowest k bits are cleared
    seen = set()
    for seed in range(60):
        result = (augment.posterise(texture, seeded(seed)) * 255).round().int()[0, 0].tolist()
        (step,) = [step for step, values in expected.items() if values == result]
        seen.add(step)
    assert seen == {1, 2, 4, 8, 16, 32, 64, 128}


def test_equalised_grey_levels_are_evenly_frequent_and_flat_channels_stay():
    texture = torch.rand(3, 64, 64, generator=seeded()) ** 1.5
    texture[2] = 0.4
    equal = augment.equalise(texture, seeded())
    for channel in equal[:2]:
        torch.testing.assert_close(
            channel.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.06
        )
    assert torch.equal(equal[2], texture[2])
    order = texture[0].flatten().argsort()
    assert (equal[0].flatten()[order].diff() >= 0).all()


def test_stretched_contrast_spans_the_range_but_for_flat_channels():
    texture = 0.3 + 0.2 * torch.rand(3, 32, 32, generator=seeded())
    texture[1] = 0.7
    for seed in range(10):
        stretched = augment.stretch_contrast(texture, seeded(seed)).clamp(0, 1)
        assert stretched[0].min() == 0
        assert stretched[0].max() == 1
        assert 0 <= float((stretched[0] == 0).float().mean()) <= 0.22
        assert torch.equal(stretched[1], texture[1])


def test_solarised_pixels_are_inverted_from_a_threshold_on_in_every_second_draw():
    texture = torch.linspace(0, 1, 256).expand(3, 1, 256)
    untouched = 0
    for seed in range(40):
        result = augment.solarise(texture, seeded(seed))
        inverted = result != texture
        untouched += not inverted.any()
        if inverted.any():
            first = int(inverted[0, 0].int().argmax())
            assert 32 <= first <= 128
            torch.testing.assert_close(result[0, 0, first:], 1 - texture[0, 0, first:])
    assert 10 < untouched < 30


def test_brightness_leaves_colour_differences():
    texture = gradient_texture()
    changed = augment.change_brightness(texture, seeded())
    torch.testing.assert_close(changed[0] - changed[1], texture[0] - texture[1])
    assert not torch.allclose(changed, texture)


def test_hue_saturation_and_value_by_hand_and_back():
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0.5, 0.5, 0.5], [0, 0, 0], [0.2, 0.1, 0.1]])
    image = image.T[:, None]
    hue, saturation, value = rgb_to_hsv(image)
    torch.testing.assert_close(hue[0], torch.tensor([0, 1 / 3, 2 / 3, 1 / 6, 0, 0, 0]))
    torch.testing.assert_close(saturation[0], torch.tensor([1, 1, 1, 1, 0, 0, 0.5]))
    torch.testing.assert_close(value[0], torch.tensor([1, 1, 1, 1, 0.5, 0, 0.2]))
    noise = torch.rand(3, 30, 30, generator=seeded())
    torch.testing.assert_close(hsv_to_rgb(*rgb_to_hsv(noise)), noise, rtol=0, atol=1e-5)
    turned = hsv_to_rgb(rgb_to_hsv(noise)[0] + 1 / 3, *rgb_to_hsv(noise)[1:])
    torch.testing.assert_close(turned, noise.roll(1, dims=0), rtol=0, atol=1e-5)


def test_colour_jitter_stays_near_and_in_range():
    image = gradient_texture()
    for seed in range(10):
        jittered = jitter_colour(image, seeded(seed), 0.1)
        assert jittered.min() >= 0
        assert jittered.max() <= 1
        assert 0 < (jittered - image).abs().mean() < 0.2
    torch.testing.assert_close(jitter_colour(image, seeded(), 0.0), image, rtol=0, atol=1e-5)


def test_turning_an_image_by_right_angles_is_exact():
    image = torch.rand(3, 16, 16, generator=seeded())
    torch.testing.assert_close(rotate_image(image, 0.0), image)
    turned = rotate_image(image, 90.0)
    quarter, back = torch.rot90(image, 1, (1, 2)), torch.rot90(image, -1, (1, 2))
    assert torch.allclose(turned, quarter, atol=1e-4) or torch.allclose(turned, back, atol=1e-4)
    torch.testing.assert_close(rotate_image(turned, -90.0), image, rtol=0, atol=1e-3)


def test_turning_keeps_circles_round_on_oblong_images_and_fills_with_black():
    rows, columns = torch.arange(21)[:, None] - 10, torch.arange(41)[None, :] - 20
    blob = torch.exp(-(rows**2 + columns**2) / 20).expand(3, 21, 41)
    torch.testing.assert_close(rotate_image(blob, 30.0), blob, rtol=0, atol=0.03)
    white = rotate_image(torch.ones(3, 21, 41), 45.0)
    assert white[:, 0, 0].max() == 0
    assert white[:, 10, 20].min() == pytest.approx(1.0)
