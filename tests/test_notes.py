"""Notes of progress: few, and no loss is forgotten between them."""

from harness import notes
from harness.notes import Loss, Notes, read_losses


def test_notes_are_a_second_apart_and_bring_all_losses_since_the_last(monkeypatch):
    now = 100.0
    monkeypatch.setattr(notes.time, "monotonic", lambda: now)
    told = []
    notify = Notes(told.append)
    for epoch in range(1, 5):
        notify("bolt", "flow loss", epoch, 4, Loss(("bolt",), "flow", epoch, 1 / epoch))
        now += 0.4
    notify("bolt", "predicting", 8, 16)
    assert [message["note"][2] for message in told] == [1, 4]
    assert [[loss.epoch for loss in message["losses"]] for message in told] == [[1], [2, 3, 4]]
    now += 1
    notify("bolt", "predicting", 16, 16)
    assert told[-1] == {"note": ["bolt", "predicting", 16, 16], "losses": []}


def test_losses_that_became_plain_lists_are_read_back():
    loss = Loss(("bolt", "nut"), "flow", 3, 0.5)
    assert read_losses([[["bolt", "nut"], "flow", 3, 0.5], loss]) == [loss, loss]
