"""The grammar: what its stories promise about their fourth sentence."""

import re
from collections import Counter, defaultdict

import pytest
import torch

from rtb_rl.tasks.language.grammar import TABLE, grammar_stories, read_plots


def draw(n, seed=0):
    return grammar_stories(n, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def stories():
    return draw(6000)


def test_a_seed_gives_the_same_stories_and_another_seed_others():
    assert draw(50) == draw(50)
    assert draw(50) != draw(50, seed=1)


def test_five_sentences_of_four_to_ten_words(stories):
    assert {len(story) for story in stories} == {5}
    lengths = {len(sentence.split()) for story in stories for sentence in story}
    assert min(lengths) >= 4
    assert max(lengths) <= 10
    for story in set(stories):
        for sentence in story:
            assert re.fullmatch(r"[A-Z][A-Za-z' ,]*\.", sentence), sentence


def test_thousands_of_stories_from_a_few_hundred_words(stories):
    found = {word for story in stories for word in re.findall(r"\w+", " ".join(story).lower())}
    assert len(set(stories)) > 5000
    assert 150 <= len(found) <= 320


def test_all_of_the_table_is_told(stories):
    texts = "\n".join(sentence for story in stories for sentence in story)
    for plot in read_plots(TABLE):
        for obstacle in plot.obstacles:
            assert len(obstacle.actions) >= 2
            for action in obstacle.actions:
                assert len(action.endings) >= 2
                for template in (*obstacle.wordings, *action.wordings, *action.endings):
                    pattern = re.sub(r"\\{\w+\\}", r"\\w+", re.escape(template))
                    assert re.search(f"^{pattern}$", texts, re.MULTILINE), template


def entropy(counts):
    share = torch.tensor(list(counts.values()), dtype=torch.float64)
    share = share / share.sum()
    return float(-(share * share.log()).sum())


def test_the_fifth_sentence_tells_about_the_fourth():
    # which action is taken, given the obstacle alone, and given the ending too: exact counts of
    # the table, each choice being uniform
    actions_of, joint = defaultdict(Counter), defaultdict(Counter)
    for plot in read_plots(TABLE):
        for obstacle in plot.obstacles:
            for action in obstacle.actions:
                key = obstacle.wordings[0]
                actions_of[key][action.wordings[0]] += 1
                for ending in action.endings:
                    joint[key, ending][action.wordings[0]] += 1
    assert min(entropy(counts) for counts in actions_of.values()) >= 0.69  # two actions or more
    assert max(entropy(counts) for counts in joint.values()) == 0  # no ending serves two actions


def test_pronouns_and_helpers_run_through_the_story(stories):
    she = {"Anna", "Clara", "Emma", "Julia", "Mary"}
    for story in stories:
        name = story[0].split()[0]
        told = set(re.findall(r"\w+", " ".join(story).lower()))
        own, other = ({"she", "her"}, {"he", "his", "him"})
        if name not in she:
            own, other = other, own
        assert told & own, story
        assert not told & other, story
        helper = re.search(r"(?:from|asked|called|with|made|piece) (?:her|his) (\w+)", story[3])
        answers = re.match(
            r"(?:Her|His) (\w+) (?:smiled|said|gave|found|had|told|came|was)", story[4]
        )
        if helper:  # somebody other than the guest of the first two sentences
            assert not re.search(rf"(?:her|his) {helper[1]}", " ".join(story[:2]), re.I), story
        if helper and answers:
            assert helper[1] == answers[1], story
