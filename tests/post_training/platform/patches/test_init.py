import inspect
from types import SimpleNamespace

from post_training.platform.patches import in_place_of


class Owner:
    @staticmethod
    def count(word):
        return len(word)

    def name(self):
        return "owner"


def test_the_new_function_stands_in_all_places_and_gets_the_old_one():
    other = SimpleNamespace(count=None)
    before = Owner.count

    @in_place_of((Owner, "count"), (other, "count"))
    def twice(count, word):
        return 2 * count(word)

    @in_place_of((Owner, "name"))
    def louder(name, self):
        return name(self).upper()

    owner = Owner()
    assert owner.count("ab") == Owner.count("ab") == other.count("ab") == 4
    assert owner.name() == "OWNER"
    assert inspect.unwrap(Owner.count) is before and Owner.count.__qualname__ == "Owner.count"
