"""Definitions, synonyms, opposites and categories."""

from __future__ import annotations


def _rows(text: str) -> list[list[str]]:
    return [[part.strip() for part in line.split(",")] for line in text.strip().splitlines()]


CATEGORIES: list[tuple[str, str]] = [
    ("cuisines", "cuisine"), ("dishes", "dish"), ("drinks", "drink"), ("ingredients", "ingredient"), ("fruit", "fruit"), ("vegetables", "vegetable"), ("animals", "animal"), ("colours", "colour"), ("jobs", "job"), ("rooms", "room"), ("household devices", "device"), ("gadgets", "gadget"), ("clothes", "garment"), ("furniture", "furniture"), ("products", "product"), ("days", "weekday"), ("months", "month"), ("kinds of weather", "weather_noun"), ("sports", "sport"), ("hobbies", "hobby"), ("school subjects", "subject"), ("languages", "language"), ("instruments", "instrument"), ("kinds of books", "book_kind"), ("kinds of films", "film_kind"), ("creative works", "work_kind"), ("places to eat", "eat_type"), ("illnesses", "illness"), ("medicines", "medicine"), ("relatives and friends", "relation"), ("currencies", "currency"), ("currency codes", "currency_code"), ("shops", "shop_kind"), ("vehicles", "vehicle"), ("feelings", "emotion"), ("public places", "place_kind"), ("parts of a town", "area"), ("cities", "city"), ("countries", "country"), ("US states", "us_state"), ("first names", "first_name"), ("family names", "last_name"), ("music genres", "music_genre"), ("music services", "music_service"), ("brands", "brand"), ("nationalities", "nationality"), ("people", "person"), ("towns", "town"), ("companies", "company"), ("restaurants", "restaurant"), ("titles", "title"), ("dates", "date"), ("times", "clock"), ("amounts of money", "amount"), ("codes", "code"), ("email addresses", "email"), ("phone numbers", "phone"), ("bands and singers", "artist"), ("teams", "team"),
]  # fmt: skip

SYNONYMS = _rows("""
big, large, huge, great
small, little, tiny
fast, quick, rapid, speedy
slow, sluggish, unhurried
happy, glad, pleased, cheerful, delighted
sad, unhappy, down, miserable
angry, furious, mad, annoyed
buy, purchase, get
sell, trade, offer
begin, start, commence
end, finish, stop, conclude
help, assist, support, aid
show, display, present
find, locate, discover
look for, search for, seek
cancel, call off, stop, revoke
reject, decline, refuse, turn down
accept, approve, agree to
fee, charge, cost
money, cash, funds
pay, settle, hand over
send, transfer, wire
receive, get, obtain
card, plastic, bank card
ATM, cash machine, cashpoint
withdraw, take out, get cash
deposit, pay in, put in
top up, add money, load
refund, money back, reimbursement
exchange, swap, convert
verify, check, confirm, prove
identity, ID, who you are
lost, missing, gone
stolen, taken, nicked
broken, damaged, faulty, out of order
freeze, block, lock
unfreeze, unblock, unlock
arrive, come, turn up, be delivered
late, delayed, overdue
delivery, shipping, shipment
parcel, package, box
order, request, ask for
change, alter, modify, edit
delete, remove, erase
close, shut, terminate
open, set up, create
recipient, receiver, beneficiary, payee
shop, store, seller, merchant
customer, client, buyer
price, cost, rate
cheap, inexpensive, low-priced, affordable
expensive, costly, pricey, dear
good, fine, nice
excellent, superb, outstanding, wonderful
bad, poor, terrible, awful
correct, right, accurate
wrong, incorrect, mistaken
odd, strange, weird, unusual
pending, waiting, not finished
reverse, undo, revert
twice, two times, double
abroad, overseas, in a foreign country
limit, maximum, cap
PIN, secret number, code
password, passcode
phone, mobile, smartphone
film, movie, picture
song, track, tune
singer, artist, musician
book, novel, volume
restaurant, eatery, place to eat
pub, bar, tavern
near, close to, next to, by
family friendly, child friendly, good for kids
rain, drizzle, showers
cold, chilly, freezing
hot, warm, boiling
rate, score, mark
add, put, include
play, put on, start
book, reserve
screening, showing, show
timetable, schedule
job, work, occupation
boss, manager, supervisor
ill, sick, unwell
doctor, physician, GP
tired, sleepy, exhausted
clever, smart, bright, intelligent
error, mistake, fault, bug
reply, answer, respond
tell, inform, let know
annoying, irritating
worried, anxious, concerned
quickly, soon, right away, at once
urgent, pressing
trip, journey, travel
luggage, baggage, bags
ticket, pass
holiday, vacation
flat, apartment
lift, elevator
petrol, gas, fuel
rubbish, trash, garbage
""")

OPPOSITES: list[tuple[str, str]] = [
    (a, b)
    for a, b in _rows("""
big, small
fast, slow
happy, sad
hot, cold
open, closed
cheap, expensive
good, bad
new, old
young, old
early, late
accept, decline
accepted, rejected
send, receive
buy, sell
deposit, withdraw
lost, found
lock, unlock
freeze, unfreeze
arrive, leave
start, stop
push, pull
on, off
in, out
up, down
left, right
near, far
full, empty
heavy, light
strong, weak
rich, poor
clean, dirty
wet, dry
hard, soft
easy, difficult
true, false
yes, no
always, never
everything, nothing
everybody, nobody
add, remove
increase, decrease
more, less
most, least
first, last
high, low
wide, narrow
deep, shallow
loud, quiet
bright, dark
safe, dangerous
right, wrong
love, hate
win, lose
remember, forget
ask, answer
lend, borrow
teach, learn
give, take
arrival, departure
profit, loss
friend, enemy
inside, outside
before, after
day, night
summer, winter
positive, negative
friendly, unfriendly
polite, rude
physical, virtual
public, private
single, double
pending, completed
sender, recipient
credit, debit
""")
]

DEFINITIONS: list[tuple[str, str]] = [
    (row[0], ", ".join(row[1:]))
    for row in _rows("""
refund, money that a shop gives back
fee, money that you pay for a service
PIN, a secret number for a bank card
ATM, a machine that gives cash
beneficiary, the person who receives a payment
transfer, the sending of money from one account to another
balance, the amount of money in an account
statement, a list of all payments of a month
overdraft, a debt on a bank account
direct debit, a payment that a company takes from your account
salary, the money somebody earns every month
currency, the money of a country
exchange rate, the price of one currency in another
invoice, a paper that says what must be paid
receipt, a paper that shows what was paid
discount, a lower price
voucher, a paper or code worth some money
deposit, money that you pay in
landlord, the owner of a rented flat
tenant, somebody who rents a flat
passenger, somebody who travels in a vehicle
luggage, the bags of a traveller
itinerary, the plan of a journey
reservation, a place kept for somebody
subscription, a regular payment for a service
playlist, a list of songs
album, a collection of songs
soundtrack, the music of a film
sequel, a film or book that continues a story
screening, the showing of a film
genre, a kind of music or film or book
forecast, a statement about the coming weather
blizzard, a storm with much snow
drizzle, light rain
thermostat, a device that controls the temperature
reminder, something that helps you to remember
password, a secret word to log in
router, a device that connects you to the internet
browser, a program for looking at websites
backup, a copy of files
database, an ordered collection of data
query, a question to a database
column, one kind of value in a table
row, one entry of a table
symptom, a sign of an illness
prescription, a doctor's order for a medicine
appointment, a time agreed for a meeting
deadline, the last moment for some work
colleague, somebody you work with
recipe, the instructions for a dish
menu, a list of dishes
cuisine, the cooking of a country
bistro, a small restaurant
bakery, a shop that sells bread
library, a place where books are lent
museum, a place that shows old or beautiful things
warranty, a promise to repair a product
parcel, something sent by post
courier, somebody who delivers parcels
fraud, a crime of getting money by lies
""")
]
