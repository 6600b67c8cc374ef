import math

import pytest
import torch
import torch.nn.functional as F
from small_splits import SHAPES, LevelSplit, normal_maps, painted, toy_context

from harness.backbones import choose_layers, level_shapes, resolve_backbone
from harness.contracts import AdgridError, Share
from harness.stages import epoch_batches, train_stage
from methods.components.draws import image_generator
from methods.uniad import Config, Rebuilder, UniAD, jitter, neighbour_mask

SETTINGS = {
    "epochs": 4,
    "batch_size": 5,
    "learning_rate": 3e-3,
    "hidden_width": 16,
    "feedforward_width": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "heads": 2,
    "neighbour_size": 3,
}


def small(**changes):
    return Config(**{**SETTINGS, **changes})


def share_of(positions, num_images=5, epoch=0, step=0):
    return Share(epoch=epoch, step=step, num_images=num_images, positions=tuple(positions))


def test_a_painted_defect_scores_highest_where_it_is():
    method = UniAD(small(epochs=40), toy_context())
    history = train_stage(method.stages()[0], LevelSplit(normal_maps(20, seed=1)), seed=0)
    method.fit(LevelSplit(normal_maps(20, seed=1)))
    normal = normal_maps(4, seed=2)
    without = method.predict(LevelSplit(normal).take(range(4))).anomaly_map
    within = method.predict(LevelSplit(painted(normal)).take(range(4))).anomaly_map
    assert within.shape == (4, 32, 32)
    assert within.dtype == torch.float32
    assert (within.amax(dim=(1, 2)) > 2 * without.amax(dim=(1, 2))).all()
    row, column = divmod(int(within.mean(dim=0).argmax()), 32)
    assert 6 <= row < 18
    assert 6 <= column < 18
    assert history[-1] < history[0] / 2


# --- features ----------------------------------------------------------------------------------------------------


def test_features_are_resized_to_the_coarsest_grid_and_laid_side_by_side():
    method = UniAD(small(), toy_context())
    fine = torch.arange(8.0)[:, None] * 10 + torch.arange(8.0)  # linear, so that interpolation is exact
    coarse = torch.arange(16.0).reshape(4, 4)
    tokens = method.tokens(LevelSplit([fine.repeat(1, 6, 1, 1), coarse.repeat(1, 10, 1, 1)]).take([0]))
    assert tokens.shape == (1, 16, 16)
    for row in range(4):
        for column in range(4):
            token = tokens[0, 4 * row + column]
            assert token[:6].tolist() == pytest.approx([row * 7 / 3 * 10 + column * 7 / 3] * 6, abs=1e-4)
            assert token[6:].tolist() == [coarse[row, column].item()] * 10


def test_levels_of_the_papers_backbone_have_272_channels():
    backbone = resolve_backbone("efficientnet_b4", "random")
    shapes = level_shapes(backbone, choose_layers(backbone, UniAD.levels), (224, 224))
    assert shapes == ((24, 112, 112), (32, 56, 56), (56, 28, 28), (160, 14, 14))
    assert UniAD(Config(), toy_context(shapes=shapes)).network.input.in_features == 272


# --- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(8, 8), (9, 5), (3, 14), (14, 14)])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_neighbour_mask_by_brute_force(grid, size):
    height, breadth = grid
    hidden = neighbour_mask(grid, size)
    assert hidden.shape == (height * breadth, height * breadth)
    for query in range(height * breadth):
        for key in range(height * breadth):
            near_rows = abs(query // breadth - key // breadth) <= size // 2
            near_columns = abs(query % breadth - key % breadth) <= size // 2
            assert hidden[query, key] == (near_rows and near_columns)


def test_a_grid_that_the_neighbourhood_covers_is_an_error():
    with pytest.raises(AdgridError, match="neighbour_size"):
        neighbour_mask((7, 7), 7)
    with pytest.raises(AdgridError, match="7 x 4"):
        neighbour_mask((7, 4), 7)
    assert not neighbour_mask((8, 7), 7).all(dim=1).any()


def network(grid=(4, 4), width=6, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Rebuilder(width, grid, small(**changes)).double().eval()


def random_tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_is_that_of_torch():
    layer = network().encoder[0].attention
    torch.nn.init.normal_(layer.query.bias)
    torch.nn.init.normal_(layer.value.bias)
    torchs = torch.nn.MultiheadAttention(16, 2, batch_first=True).double()
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        torchs.in_proj_bias.copy_(torch.cat([layer.query.bias, torch.full((16,), 3.0), layer.value.bias]))
        torchs.out_proj.load_state_dict(layer.output.state_dict())
    tokens, source, position = random_tokens(2, 16, 16), random_tokens(2, 16, 16, seed=1), random_tokens(16, 16, seed=2)
    for hidden in (neighbour_mask((4, 4), 3), None):
        # The bias of the keys, 3 here, makes no difference.
        change, _ = torchs(tokens + position, source + position, source, attn_mask=hidden)
        expected = layer.norm(tokens + change)
        torch.testing.assert_close(layer(tokens, source, position, hidden), expected)


def test_masked_attention_by_brute_force():
    layer = network().encoder[0].attention
    tokens, source, position = random_tokens(1, 16, 16), random_tokens(1, 16, 16, seed=1), random_tokens(16, 16, seed=2)
    hidden, query = neighbour_mask((4, 4), 3), 6
    seen = [key for key in range(16) if max(abs(key // 4 - 1), abs(key % 4 - 2)) > 1]  # patch 6 is in row 1, column 2
    asked = layer.query(tokens[0, query] + position[query])
    keys, values = layer.key(source[0, seen] + position[seen]), layer.value(source[0, seen])
    mixed = [
        (keys[:, rows] @ asked[rows] / math.sqrt(8)).softmax(dim=0) @ values[:, rows]
        for rows in (slice(0, 8), slice(8, 16))
    ]
    total = tokens[0, query] + layer.output(torch.cat(mixed))
    expected = (total - total.mean()) / (total.var(unbiased=False) + 1e-5).sqrt()  # a fresh norm scales nothing
    torch.testing.assert_close(layer(tokens, source, position, hidden)[0, query], expected)


def test_the_network_by_its_definition():
    net, tokens = network(encoder_layers=2), random_tokens(2, 16, 6)
    position = torch.stack(
        [torch.cat([net.column_embedding[p % 4], net.row_embedding[p // 4]]) for p in range(16)]
    )  # the first half tells the column
    memory = net.input(tokens)
    for layer in net.encoder:
        attended = layer.attention(memory, memory, position, net.hidden)
        memory = layer.feedforward.norm(attended + layer.feedforward.layers(attended))
    out = memory
    for layer in net.decoder:
        query = layer.query.repeat(2, 1, 1)
        first = layer.to_memory(query, memory, position, net.hidden)
        second = layer.to_previous(first, out, position, net.hidden)
        out = layer.feedforward.norm(second + layer.feedforward.layers(second))
    torch.testing.assert_close(net(tokens), net.output(net.norm(out)))


def test_a_single_decoder_layer_cannot_see_the_neighbourhood_of_a_patch():
    net = network(encoder_layers=0, decoder_layers=1)
    tokens = random_tokens(1, 16, 6).requires_grad_()
    patch = 5
    net(tokens)[0, patch].sum().backward()
    seen = tokens.grad[0].abs().sum(dim=1) > 0
    assert torch.equal(seen, ~neighbour_mask((4, 4), 3)[patch])


def test_without_a_neighbourhood_everything_is_seen():
    net = network(neighbour_size=0, encoder_layers=0, decoder_layers=1)
    assert net.hidden is None
    tokens = random_tokens(1, 16, 6).requires_grad_()
    net(tokens)[0, 5].sum().backward()
    assert (tokens.grad[0].abs().sum(dim=1) > 0).all()


def test_lower_precision_changes_little():
    net, tokens = network().float(), random_tokens(2, 16, 6).float()
    exact = net(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = net(tokens).float()
    assert (coarse - exact).norm() < 0.03 * exact.norm()


def test_weights_start_from_xavier_and_biases_from_zero():
    net = UniAD(Config(neighbour_size=3), toy_context()).network
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            outputs, inputs = module.weight.shape
            if name.endswith((".query", ".key", ".value")):
                outputs *= 3  # one matrix for the three
            bound = math.sqrt(6 / (inputs + outputs))
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert module.bias is None or not module.bias.any(), name


# --- training ----------------------------------------------------------------------------------------------------


def test_jitter_by_hand():
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    noise = torch.tensor([[[1.0, -2.0], [5.0, 5.0]]])
    # The norm 5 over 2 numbers, times 20, is 50.
    assert jitter(tokens, noise, 20.0).tolist() == [[[53.0, -96.0], [0.0, 0.0]]]


def test_the_loss_by_hand():
    method, split = UniAD(small(dropout=0.0), toy_context()), LevelSplit(normal_maps(5, seed=1))
    batch = split.take([3, 1])
    (loss,) = method.stages()[0].losses(batch, share_of([0, 1], num_images=2, epoch=7))
    total = 0.0
    for place, number in enumerate([3, 1]):
        tokens = method.tokens(split.take([number]))
        noise = torch.randn(16, 16, generator=image_generator(method.context, "jitter", batch.samples[place], 7))
        noisy = tokens + noise * 20 * tokens.square().sum(dim=2, keepdim=True).sqrt() / 16
        total += (method.network(noisy) - tokens).square().mean().item()
    assert loss.item() == pytest.approx(total / 2, rel=1e-5)


def test_losses_and_gradients_of_the_workers_sum_up_to_those_of_one():
    split, method = LevelSplit(normal_maps(5, seed=1)), UniAD(small(dropout=0.0), toy_context())

    def gradients(positions):
        method.network.zero_grad()
        (loss,) = method.stages()[0].losses(split.take(positions), share_of(positions))
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in method.network.parameters()]

    loss, expected = gradients(range(5))
    parts = [gradients(positions) for positions in [(0, 2, 4), (1, 3)]]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-5)
    for gradient, *found in zip(expected, *(grads for _, grads in parts), strict=True):
        torch.testing.assert_close(sum(found), gradient, rtol=1e-4, atol=1e-6)


def test_two_workers_end_with_the_weights_of_one_without_dropout():
    split, config = LevelSplit(normal_maps(10, seed=1)), small(dropout=0.0, decay_epochs=2)
    alone, together = UniAD(config, toy_context()), UniAD(config, toy_context())
    train_stage(alone.stages()[0], split, seed=0)
    stage = together.stages()[0]
    (optimizer,) = stage.configure_optimizers()
    for epoch in range(stage.epochs):
        for step, places in enumerate(epoch_batches(10, 5, 0, epoch)):
            optimizer.param_groups[0]["lr"] = config.learning_rate * 0.1 ** (epoch // 2)
            optimizer.zero_grad()
            for rank in range(2):
                share = share_of(range(rank, 5, 2), epoch=epoch, step=step)
                (loss,) = stage.losses(split.take(places[rank::2]), share)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(together.network.parameters(), 0.1)
            optimizer.step()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_noise_differs_between_images_and_epochs():
    method, split = UniAD(small(), toy_context()), LevelSplit(normal_maps(2, seed=1))
    stage, batch = method.stages()[0], split.take([0, 1])
    tokens = method.tokens(batch)
    first, again, later = (stage._draw_noise(batch, epoch, tokens) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, later)


def test_noise_and_dropout_are_of_training_alone():
    method = UniAD(small(dropout=0.5), toy_context())
    split = LevelSplit(normal_maps(5, seed=1))
    train_stage(method.stages()[0], split, seed=0)
    batch = split.take(range(5))
    tokens = method.tokens(batch)
    first = method.predict(batch).anomaly_map
    assert torch.equal(first, method.predict(batch).anomaly_map)
    errors = (method.network(tokens) - tokens).square().sum(dim=2).sqrt().reshape(5, 1, 4, 4)
    expected = F.interpolate(errors, (32, 32), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(first, expected.detach())


def test_learning_rate_is_that_of_torchs_steplr():
    stage = UniAD(Config(neighbour_size=3, epochs=25, decay_epochs=10), toy_context()).stages()[0]
    (optimizer,) = stage.configure_optimizers()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.1)
    for epoch in range(25):
        assert 1e-4 * stage.lr_factor(epoch + 0.5) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_the_paper_is_the_default():
    stage = UniAD(Config(neighbour_size=3), toy_context()).stages()[0]
    assert (stage.epochs, stage.batch_size, stage.clip_norm) == (1000, 8, 0.1)
    assert (stage.lr_factor(799.9), stage.lr_factor(800)) == (1.0, pytest.approx(0.1))
    (optimizer,) = stage.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
    assert len(stage.module.encoder) == len(stage.module.decoder) == 4


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"decay_epochs": 0},
        {"clip_norm": 0.0},
        {"hidden_width": 20},
        {"feedforward_width": 0},
        {"encoder_layers": -1},
        {"decoder_layers": 0},
        {"heads": 0},
        {"dropout": 1.0},
        {"neighbour_size": 4},
        {"jitter_scale": -1.0},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


def test_presets_are_settings():
    config = Config(**UniAD.presets["adpretrain"])
    assert (config.hidden_width, config.feedforward_width) == (512, 2048)


def test_other_seeds_start_from_other_weights():
    first, same, other = (UniAD(small(), toy_context(seed=seed)).state_dict() for seed in (0, 0, 1))
    for name in ("input.weight", "decoder.0.query", "row_embedding"):
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])
    assert sum(shape[0] for shape in SHAPES) == first["input.weight"].shape[1]
