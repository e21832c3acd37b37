"""Short English stories of five sentences, from a grammar: somebody wants something, something is
in the way, something is done about it, and it ends well or badly.

Sentence 3 (the obstacle) allows several sentences 4 (the action), and every action has endings of
its own, so that the fourth sentence is open given the first three and betrayed by the fifth. Names,
pronouns, things and helpers run through the whole story.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Generator

# Lines begin with the number of the sentence; " | " parts wordings of the same. The actions (4)
# below an obstacle (3) are what may be done about it, the endings (5) what may come of an action.
TABLE = """
about bike | guitar | drum | kite | boat | violin
1 {name} wanted to buy a {colour} {thing}. | {name} saw a {colour} {thing} in a shop.
2 {They} thought about it every day. | {Their} {guest} had one just like it.
3   But it cost more than {they} had. | But {they} did not have enough money.
4     So {they} asked {their} {helper} for some money.
5       {Their} {helper} smiled and paid for it.
5       {Their} {helper} said no, and {they} was sad.
5       {Their} {helper} gave it to {them} a week later.
4     So {they} washed cars all summer. | So {they} began to wash cars after school.
5       After a hundred cars {they} bought the {thing}.
5       The cars were very dirty, but the work paid.
5       {They} got tired of cars and soon gave up.
4     So {they} sold {their} old toys at the market.
5       Nobody wanted the toys, so {they} stayed poor.
5       The toys were soon gone, and {they} was rich.
5       {They} bought the {colour} {thing} but missed {their} toys.
4     So {they} took some money from {their} {helper}.
5       {Their} {helper} found out and was very angry.
5       {They} felt bad and gave the money back.
4     So {they} made a {thing} out of wood. | So {they} built one out of old wood.
5       The wooden {thing} broke after only one day.
5       Everybody loved the wooden {thing}.
5       {They} was proud and painted the wood {colour}.
3   But the shop was closed all week. | But somebody else bought it first.
4     So {they} wrote a long letter to the shop.
5       No answer ever came, and {they} forgot it.
5       The answer came with a {colour} {thing} for {them}.
4     So {they} looked for one in the next town. | So {they} took a bus to the next town.
5       {They} found an even better {thing} there.
5       {They} came home late with empty hands.
4     So {they} made a {thing} out of wood. | So {they} built one out of old wood.
5       The wooden {thing} broke after only one day.
5       Everybody loved the wooden {thing}.
5       {They} was proud and painted the wood {colour}.

about cake | pie | pudding
1 {name} wanted to make a {thing} for {their} {guest}. | {name} set out to make a {thing}.
2 It was the birthday of {their} {guest}. | {Their} {guest} was coming to visit.
3   But there were no eggs in the kitchen. | But {they} had dropped all the eggs.
4     So {they} borrowed some eggs from {their} {helper}.
5       {Their} {helper} got the first piece of the {thing}.
5       The eggs were bad, and so was the {thing}.
4     So {they} made it without any eggs.
5       It was as hard as a stone.
5       It was still the best {thing} of the year.
4     So {they} bought a {thing} at the bakery. | So {they} ran to the bakery for another.
5       {Their} {guest} never knew where it came from.
5       The {thing} from the bakery was far too sweet.
3   But {they} fell asleep and the {thing} burned. | But the {thing} turned black.
4     So {they} covered the black parts with cream.
5       Nobody noticed anything under the cream.
5       {Their} {guest} ate the cream and left the rest.
4     So {they} bought a {thing} at the bakery. | So {they} ran to the bakery for another.
5       {Their} {guest} never knew where it came from.
5       The {thing} from the bakery was far too sweet.
4     So {they} sang a song for {their} {guest}.
5       The song made {their} {guest} very happy.
5       {They} sang so badly that everybody laughed.

about dog | cat | rabbit | pony
1 {name} had a {colour} {thing}. | {name} got a {thing} from {their} {guest}.
2 {They} played with it every day. | It was {their} best friend.
3   One morning the {thing} was gone. | But one night the {thing} ran away.
4     {They} put up posters all over the town.
5       A man saw a poster and called {them}.
5       The rain washed the posters away.
4     {They} looked in the forest with {their} {helper}.
5       {Their} {helper} found the {thing} behind a tree.
5       It was not in the forest but behind the house.
4     {They} put a bowl of food outside the door.
5       The smell of the food brought it home.
5       In the morning a fox had eaten the food.
3   One day the {thing} would not eat. | But then the {thing} was not well.
4     {They} took the {thing} to a doctor. | {They} called a doctor in the middle of the night.
5       The doctor gave it something, and it slept well.
5       The doctor laughed because it was only too fat.
4     {They} gave it warm milk with a spoon.
5       It drank the milk and was soon well again.
5       It did not like the milk and bit {them}.

about race | match | game
1 {name} wanted to win the {thing} at school. | {name} was ready for the big {thing}.
2 The prize was a {colour} cup. | {Their} {guest} would be watching.
3   But {they} did not feel well that week. | But {they} was afraid to lose.
4     {They} stayed in bed and drank hot tea.
5       The tea helped, and {they} won the {thing}.
5       {They} slept too long and missed the {thing}.
4     {They} asked {their} {helper} what to do.
5       {Their} {helper} had a good idea, and {they} won.
5       {Their} {helper} told {them} to have fun, and {they} did.
4     {They} got up at five to practise more.
5       The early mornings paid, and {they} won easily.
5       {They} was so tired that {they} came last.
3   But all the others were much better. | But {they} had lost every time before.
4     {They} asked {their} {helper} what to do.
5       {Their} {helper} had a good idea, and {they} won.
5       {Their} {helper} told {them} to have fun, and {they} did.
4     {They} made a plan to cheat. | So {they} decided to cheat.
5       The judge saw it and sent {them} home.
5       {They} won but could not enjoy the {colour} cup.
4     {They} got up at five to practise more.
5       The early mornings paid, and {they} won easily.
5       {They} was so tired that {they} came last.

about lake | zoo | beach | castle
1 {name} planned a trip to the {thing}. | {name} had never been to the {thing}.
2 {They} packed a {colour} bag the night before. | {Their} {guest} had told {them} about it.
3   But the bus broke down on the way. | But {they} got off the bus too early.
4     So {they} walked the rest of the way.
5       {They} reached the {thing} with sore feet.
5       {They} walked too slowly and never saw the {thing}.
4     So {they} called {their} {helper}.
5       {Their} {helper} came at once in an old car.
5       {Their} {helper} was asleep and did not answer.
3   But it rained the whole morning. | But on that day it rained.
4     So {they} took an umbrella and went anyway.
5       The wind soon broke the {colour} umbrella.
5       Under the umbrella {they} stayed warm and dry.
4     So {they} stayed at home and read a book. | So {they} opened a long book.
5       The book was so good that {they} forgot the rain.
5       After the last page the sun came out.
4     So {they} called {their} {helper}.
5       {Their} {helper} came at once in an old car.
5       {Their} {helper} was asleep and did not answer.
"""
PRONOUNS = {
    "she": {"they": "she", "They": "She", "their": "her", "Their": "Her", "them": "her"},
    "he": {"they": "he", "They": "He", "their": "his", "Their": "His", "them": "him"},
}
HEROES = {
    "she": ("Anna", "Clara", "Emma", "Julia", "Mary"),
    "he": ("Ben", "David", "Frank", "Tom", "Paul"),
}
COLOURS = ("red", "brown", "grey", "black", "white")
PEOPLE = ("mother", "father", "sister", "brother", "uncle", "friend", "teacher")
CHOICES = 14  # as many as `_story` makes

T = TypeVar("T")


@dataclass
class Action:
    """Sentence 4 in its wordings, and the sentences 5 that may follow."""

    wordings: list[str]
    endings: list[str] = field(default_factory=list)


@dataclass
class Obstacle:
    """Sentence 3 in its wordings, and what may be done about it."""

    wordings: list[str]
    actions: list[Action] = field(default_factory=list)


@dataclass
class Plot:
    """The things that it may be about, sentences 1 and 2, and what may get in the way."""

    things: list[str]
    openings: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)


def grammar_stories(n: int, *, generator: Generator) -> list[tuple[str, ...]]:
    """`n` stories of five sentences, drawn independently; some may be alike."""
    plots = read_plots(TABLE)
    draws = torch.randint(2**31, (n, CHOICES), generator=generator)
    return [_story(plots, iter(row)) for row in draws.tolist()]


def read_plots(table: str) -> list[Plot]:
    """The plots of a table as above."""
    plots: list[Plot] = []
    for line in filter(None, table.splitlines()):
        sentence, _, text = line.partition(" ")
        options = text.strip().split(" | ")
        if sentence == "about":
            plots.append(Plot(options))
        elif sentence == "1":
            plots[-1].openings += options
        elif sentence == "2":
            plots[-1].reasons += options
        elif sentence == "3":
            plots[-1].obstacles.append(Obstacle(options))
        elif sentence == "4":
            plots[-1].obstacles[-1].actions.append(Action(options))
        else:
            plots[-1].obstacles[-1].actions[-1].endings += options
    return plots


def _story(plots: Sequence[Plot], draws: Iterator[int]) -> tuple[str, ...]:
    """One story; each choice takes the remainder of the next of `draws`."""

    def pick(options: Sequence[T]) -> T:
        return options[next(draws) % len(options)]

    plot = pick(plots)
    obstacle = pick(plot.obstacles)
    action = pick(obstacle.actions)
    pronoun = pick(tuple(PRONOUNS))
    guest = pick(PEOPLE)
    words = PRONOUNS[pronoun] | {
        "name": pick(HEROES[pronoun]),
        "thing": pick(plot.things),
        "colour": pick(COLOURS),
        "guest": guest,
        "helper": pick([one for one in PEOPLE if one != guest]),
    }
    parts = (plot.openings, plot.reasons, obstacle.wordings, action.wordings, action.endings)
    return tuple(pick(part).format_map(words) for part in parts)
