"""Word lists from which names and values of the training corpus are drawn."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    """The comma-separated or line-separated entries of `text`."""
    return tuple(entry.strip() for line in text.splitlines() for entry in line.split(",") if entry.strip())


FIRST_NAMES = _split("""
Aaron, Abena, Adam, Adele, Adriana, Agnes, Ahmed, Aiko, Aisha, Alan, Albert, Alejandro, Alice, Alina, Amara
Amelia, Amina, Amir, Ana, Anders, Andrea, Andrew, Angela, Anika, Anita, Anna, Anton, Antonio, Arjun, Arthur
Astrid, Audrey, Ayumi, Aziz, Barbara, Beatriz, Benedict, Benjamin, Bernard, Bianca, Birgit, Bogdan, Brenda
Brian, Bruno, Camila, Carla, Carlos, Carmen, Caroline, Catherine, Cecilia, Chang, Charles, Chidi, Chloe
Christine, Clara, Claude, Colin, Conor, Craig, Dagmar, Daisuke, Daniel, Daria, David, Deborah, Deepak, Demetrius
Diana, Diego, Dimitri, Dmitri, Dolores, Dominic, Donna, Dorothy, Douglas, Edith, Eduardo, Edward, Eileen, Elena
Elias, Elif, Elizabeth, Ella, Emeka, Emil, Emily, Emma, Enrique, Eric, Esther, Eva, Fabio, Farah, Fatima, Felix
Fernando, Fiona, Florence, Frances, Francesca, Frank, Frida, Gabriel, Gareth, George, Gemma, Giovanni, Gloria
Grace, Greta, Gustav, Hana, Hannah, Hans, Harriet, Hassan, Heather, Hector, Helen, Henrik, Hiroshi, Hugo, Ian
Ibrahim, Ida, Ifeoma, Imran, Ines, Ingrid, Irene, Isaac, Isabel, Ivan, Ivy, Jack, Jacob, Jamal, James, Jana
Janet, Jasmine, Javier, Jelena, Joan, Joanna, Johan, Jonas, Jorge, Joseph, Joyce, Julia, Julian, Kamal, Karen
Karim, Karin, Katarina, Kavita, Kenji, Kevin, Khalid, Klara, Kofi, Kwame, Lars, Laura, Layla, Leif, Lena, Leo
Leonard, Liam, Lina, Linda, Ling, Louis, Lucia, Lucy, Luis, Lukas, Magda, Malik, Manuel, Marcus, Margaret, Maria
Mariam, Marie, Mark, Marta, Martin, Mateo, Matilda, Maya, Mehmet, Mei, Michael, Miguel, Milan, Mina, Miriam
Mohammed, Monica, Nadia, Naomi, Natalia, Nathan, Neil, Nia, Nicola, Nikhil, Nina, Noah, Nora, Olga, Oliver, Omar
Oscar, Otto, Pablo, Patricia, Patrick, Paul, Paula, Pedro, Peter, Petra, Philip, Pia, Priya, Rachel, Rafael
Rahul, Raj, Rebecca, Renata, Ricardo, Rita, Robert, Rosa, Ruth, Samuel, Sandra, Sanjay, Sara, Sean, Selma, Simon
Sofia, Stefan, Sunita, Susan, Sven, Tamara, Tariq, Teresa, Theo, Thomas, Tomas, Uma, Ursula, Vera, Victor
Vikram, Wanda, Wei, William, Xavier, Yara, Yasmin, Yuki, Yusuf, Zainab, Zoe
""")

SURNAMES = _split("""
Abbott, Abdullah, Acheampong, Adams, Adeyemi, Ahmed, Akhtar, Allen, Almeida, Alvarez, Andersen, Anderson
Andrade, Appiah, Archer, Arnold, Atkinson, Baker, Bakker, Banerjee, Barker, Barnes, Barros, Bauer, Becker, Bell
Bennett, Berg, Bergman, Bishop, Blake, Blanc, Boateng, Bondarenko, Booth, Bradley, Brandt, Brennan, Briggs
Brooks, Brown, Bryant, Burke, Burton, Byrne, Caldwell, Campbell, Carlsson, Carter, Castillo, Castro, Chambers
Chan, Chandra, Chapman, Chavez, Chen, Chowdhury, Clarke, Cohen, Coleman, Collins, Conti, Cooper, Costa, Crawford
Cruz, Cunningham, Dahl, Dalton, Daniels, Das, Davies, Dawson, Delgado, Desai, Diallo, Diaz, Dixon, Donovan
Doyle, Dubois, Duffy, Duncan, Dvorak, Edwards, Ekwueme, Eliasson, Ellis, Ellison, Eriksen, Esposito, Evans
Farrell, Fernandes, Ferrari, Fischer, Fisher, Fleming, Fletcher, Flores, Fontaine, Forster, Foster, Fowler
Fraser, Friedman, Fuchs, Fujita, Gallagher, Garcia, Gardner, George, Ghosh, Gibson, Gill, Gomez, Gonzalez
Goodwin, Graham, Grant, Greene, Griffin, Gruber, Gupta, Haas, Hall, Hamilton, Hansen, Harper, Harris, Hartmann
Hassan, Hayashi, Hayes, Henderson, Hernandez, Hill, Hoffman, Holm, Holmes, Horvat, Howard, Huang, Hughes, Hunt
Hussain, Ibrahim, Ito, Ivanov, Jackson, Jansen, Jenkins, Jensen, Johansson, Johnson, Jones, Joshi, Kaminski
Kang, Kapoor, Kaya, Keller, Kelly, Kennedy, Khan, Kim, Kimura, King, Klein, Kobayashi, Koch, Kovac, Kowalski
Kumar, Kuznetsov, Lambert, Lang, Larsen, Laurent, Lawson, Lee, Lehmann, Lewis, Li, Lindberg, Lopez, Lowe, Lund
Macdonald, Mahmoud, Malik, Mancini, Marino, Marsh, Martin, Martinez, Mason, Matthews, Mbeki, McCarthy, McKenzie
Mehta, Meier, Mendes, Mensah, Meyer, Miller, Mishra, Mitchell, Moreau, Moreno, Morgan, Mori, Morris, Moyo
Muller, Murphy, Murray, Mwangi, Nakamura, Nair, Navarro, Ncube, Nelson, Newman, Nguyen, Nielsen, Nilsson, Novak
Nowak, Nwosu, Odell, Oduya, Okafor, Okonkwo, Oliveira, Olsen, Onyango, Ortega, Osei, Owens, Ozturk, Palmer, Park
Parker, Patel, Pereira, Perry, Petrov, Pham, Phillips, Pinto, Popescu, Porter, Powell, Price, Quinn, Ramirez
Ramos, Rao, Rashid, Reddy, Reed, Reyes, Ricci, Richards, Rivera, Roberts, Robinson, Romano, Rossi, Rousseau, Roy
Russo, Ryan, Salazar, Sanchez, Santos, Sato, Schmidt, Schneider, Schwarz, Scott, Sharma, Shaw, Silva, Simpson
Singh, Smirnov, Smith, Sokolov, Sorensen, Sousa, Spencer, Stein, Stewart, Stone, Sullivan, Suzuki, Svensson
Takahashi, Tan, Tanaka, Taylor, Thapa, Thompson, Torres, Toure, Turner, Ueda, Vargas, Varga, Vasquez, Vega
Visser, Vogel, Wagner, Walker, Wallace, Wang, Watanabe, Watson, Weber, Webster, White, Wilkins, Williams, Winter
Wolf, Wong, Wood, Wright, Xu, Yamamoto, Yang, Yilmaz, Young, Zhang, Zimmer
""")

CITIES = _split("""
Aberdeen, Accra, Adelaide, Albany, Algiers, Amman, Amsterdam, Ankara, Antwerp, Asheville, Athens, Auckland
Austin, Bamako, Bangalore, Bangkok, Barcelona, Basel, Bath, Beirut, Belfast, Belgrade, Bergen, Berlin, Bilbao
Birmingham, Bogota, Boise, Bologna, Bordeaux, Boston, Boulder, Bratislava, Bremen, Brighton, Brisbane, Bristol
Bruges, Brussels, Bucharest, Budapest, Buenos Aires, Buffalo, Bursa, Busan, Cairo, Calgary, Cambridge, Canberra
Cape Town, Cardiff, Carlisle, Casablanca, Chennai, Chester, Chicago, Christchurch, Cleveland, Cologne, Colombo
Copenhagen, Cordoba, Cork, Cusco, Dakar, Dallas, Davos, Delhi, Denver, Derby, Detroit, Dhaka, Dijon, Dortmund
Dover, Dresden, Dubai, Dublin, Dundee, Durban, Durham, Edinburgh, Exeter, Faro, Florence, Frankfurt, Fukuoka
Galway, Gdansk, Geneva, Genoa, Ghent, Glasgow, Gothenburg, Granada, Graz, Grenoble, Hamburg, Hanoi, Hanover
Harare, Havana, Helsinki, Hobart, Houston, Innsbruck, Inverness, Istanbul, Izmir, Jaipur, Jakarta, Kampala
Karachi, Kathmandu, Kyoto, Krakow, Kumasi, Lagos, Lahore, Lausanne, Leeds, Leicester, Leipzig, Lille, Lima
Limerick, Lisbon, Liverpool, Ljubljana, London, Lucerne, Lusaka, Lyon, Madrid, Malaga, Malmo, Manchester, Manila
Maputo, Marseille, Medellin, Melbourne, Memphis, Milan, Minsk, Mombasa, Montreal, Mumbai, Munich, Nagoya
Nairobi, Nantes, Naples, New Orleans, Newcastle, Nice, Norwich, Nottingham, Oakland, Odense, Osaka, Oslo, Ottawa
Oxford, Padua, Palermo, Paris, Penang, Perth, Pisa, Plymouth, Portland, Porto, Prague, Pune, Quebec, Quito
Reading, Reykjavik, Richmond, Riga, Rome, Rotterdam, Salamanca, Salzburg, Santiago, Sapporo, Sarajevo, Savannah
Seattle, Seoul, Seville, Sheffield, Singapore, Sofia, Split, Stavanger, Stockholm, Stuttgart, Swansea, Sydney
Tallinn, Tampere, Tartu, Tokyo, Toledo, Toronto, Toulouse, Trieste, Tromso, Tunis, Turin, Uppsala, Utrecht
Valencia, Vancouver, Venice, Verona, Vienna, Vilnius, Warsaw, Wellington, Winnipeg, York, Zagreb, Zurich
""")

ADJECTIVES = _split("""
old, new, small, large, big, little, long, short, tall, wide, narrow, thin, thick, flat, round, square, heavy
light, dark, bright, pale, deep, shallow, high, low, fast, slow, quick, quiet, loud, soft, hard, rough, smooth
sharp, blunt, warm, cold, cool, hot, dry, wet, damp, clean, dirty, dusty, fresh, stale, sweet, sour, bitter
salty, spicy, plain, fancy, simple, modern, ancient, antique, vintage, rustic, rural, urban, royal, noble
humble, gentle, kind, brave, bold, shy, calm, happy, merry, jolly, proud, clever, wise, silly, funny, lucky
busy, lazy, sleepy, tired, lively, strong, weak, tough, tender, firm, loose, tight, stiff, solid, hollow, empty
full, open, closed, hidden, secret, public, private, common, rare, strange, odd, even, single, double, triple
spare, extra, main, minor, major, early, late, final, first, last, next, daily, weekly, annual, northern
southern, eastern, western, central, upper, lower, inner, outer, front, rear, left, right, middle, local
foreign, distant, nearby, red, blue, green, yellow, white, black, grey, brown, pink, purple, golden, silver
copper, wooden, iron, steel, glass, woollen, cotton, silk, leather, paper, plastic, rubber, stone, ceramic
marble, crystal, amber, crimson, scarlet, ivory, velvet, woven, knitted, painted, polished, carved, folded
curved, bent, straight, crooked, broken, cracked, mended, patched, torn, striped, spotted, checked, shiny, dull
glossy, rusty, misty, foggy, sunny, cloudy, rainy, snowy, windy, stormy, frosty, icy, mossy, leafy, grassy
sandy, muddy, rocky, hilly, steep, winding, crowded, lonely, wild, tame, young, elder, fine, grand, great, noisy
silent, hungry, thirsty, careful, handy, portable, electric, magnetic, digital, manual, automatic, cheap, costly
precious, perfect, ordinary, curious, famous, favourite, friendly, loyal, modest, nimble, graceful, elegant
charming, cheerful, cosy, comfortable, colourful, fragrant, floral, creamy, crispy, crunchy, juicy, ripe, raw
frozen, floating, flying, running, sleeping, singing, dancing, waterproof
""")

NOUNS = _split("""
acorn, airship, alarm clock, album, almanac, anchor, ankle boot, anvil, apple, apron, aquarium, arch, armchair
arrow, ash, atlas, attic, axe, backpack, badge, badger, bagpipe, bakery, balcony, ball, balloon, banana, band
banjo, banner, barge, barn, barrel, basin, basket, bat, bath, battery, beach, beacon, bead, beaker, beam, bean
bear, beard, beaver, bed, bee, beech, beehive, beetle, bell, bellows, belt, bench, berry, bicycle, binder, birch
bird, biscuit, blanket, blender, block, blossom, blouse, board, boat, bolt, bone, bonfire, bonnet, book
bookcase, boot, bottle, boulder, bowl, box, bracelet, branch, brick, bridge, briefcase, broom, brush, bubble
bucket, buckle, bud, buffalo, bulb, bull, bunk, bus, bush, butter dish, buttercup, butterfly, button, cabin
cabinet, cable, cactus, cage, cake, calendar, camel, camera, canal, candle, canoe, canvas, canyon, cape, caravan
card, cargo, carpet, carriage, carrot, cart, cartoon, castle, cat, cathedral, cave, cedar, cello, chain, chair
chalice, chalk, chapel, chariot, cherry, chess set, chest, chestnut, chicken, chimney, chisel, cinema, circle
clam, clarinet, clay pot, cliff, cloak, clock, cloth, cloud, clover, coach, coal, coast, coat, coaster, cobra
cobweb, cockpit, coconut, coffee pot, coin, collar, column, comb, comet, compass, cone, cookie, coral, cork
corner, cot, cottage, couch, cove, cow, crab, cradle, crane, crate, crayon, creek, cricket, crocus, crow, crown
crumb, cube, cuckoo, cucumber, cup, cupboard, curtain, cushion, cymbal, cypress, daffodil, dagger, dahlia, daisy
dam, dandelion, dart, deer, desk, desk lamp, dew, diamond, diary, dice, dictionary, dinghy, dish, diver, dock
dog, doll, dolphin, dome, donkey, door, doorbell, doormat, doorstep, dove, dragon, dragonfly, drawer, dress
drill, drum, duck, dune, dustpan, duvet, eagle, earring, earth, easel, eel, egg, egg cup, elephant, elevator
elk, ember, emerald, engine, envelope, eraser, falcon, fan, farm, faucet, feather, fence, fern, ferry, fiddle
field, fig, filter, finch, fir, fire, fireplace, fish, flag, flagpole, flame, flamingo, flask, flea, fleece
flint, flower, flower pot, flute, foal, folder, footbridge, footpath, forest, fork, fort, fountain, fox, frame
freezer, frog, fruit bowl, funnel, gallery, galleon, garage, garden, gate, gazelle, gecko, gem, geyser, giraffe
glacier, glass, glove, goat, goggles, goldfish, gong, goose, gorge, gourd, grape, grasshopper, greenhouse
griddle, grove, guitar, gull, hairbrush, hallway, hammer, hammock, hamper, hamster, handbag, handle, harbour
hare, harness, harp, harvest, hat, hatch, haven, hawk, hawthorn, hazel, headland, heart, hearth, heather, hedge
hedgehog, helicopter, helmet, hen, heron, hill, hinge, hippo, hive, hoe, holly, hook, hoop, horizon, horn, horse
horseshoe, hose, hotel, hourglass, house, hummingbird, hut, hydrant, iceberg, igloo, inkwell, insect, iris, iron
island, ivy, jacket, jaguar, jar, jasmine, jay, jeep, jelly, jetty, jewel, jigsaw, journal, jug, jungle, juniper
kangaroo, kayak, kennel, kettle, key, key ring, keyboard, kingfisher, kiosk, kitchen, kite, kitten, knapsack
knife, knight, knob, knot, koala, lace, ladder, ladle, ladybird, lagoon, lake, lamb, lamp, lamp post, lantern
lapwing, larch, lark, lasso, lattice, laurel, lavender, lawn, leaf, ledge, lemon, lens, leopard, letter
letterbox, lettuce, lever, library, lid, lighthouse, lightning, lilac, lily, lime, linen, lion, lizard, llama
lobster, lock, locket, locomotive, lodge, log, loom, lotus, lute, lynx, magazine, magnet, magnolia, magpie
mailbox, mallet, mallow, mandolin, mango, mansion, map, maple, marigold, market, marmot, marsh, mask, mast
match, mattress, meadow, medal, melon, meteor, microphone, microscope, mill, millstone, mint, mirror, mitten
moat, mole, monkey, monument, moon, moose, mop, mosaic, moss, moth, motor, mountain, mouse, mug, mulberry, mule
museum, mushroom, napkin, narwhal, necklace, needle, nest, net, nettle, newt, nightingale, noodle, notebook
nutmeg, oak, oar, oasis, oboe, ocean, octopus, olive, onion, opal, orange, orbit, orchard, orchid, organ, osprey
ostrich, otter, oven, owl, ox, oyster, paddle, padlock, pagoda, pail, paint tin, paintbrush, palace, palm, pan
pancake, panda, pansy, panther, paper clip, parachute, parasol, parcel, park, parrot, parsley, passport, pasture
patch, path, pavilion, peach, peacock, peanut, pear, pearl, pebble, pedal, pelican, pen, pencil, pencil case
pendulum, penguin, pepper, perch, petal, pheasant, photograph, piano, picnic basket, picture, pier, pig, pigeon
pillar, pillow, pin, pine, pineapple, pipe, pitchfork, plank, planet, plate, plough, plum, pocket, pocket watch
pond, pony, poppy, porch, porcupine, postcard, poster, pot, potato, prism, puddle, puffin, pump, pumpkin, puppet
purse, puzzle, pyramid, quail, quarry, quartz, quill, quilt, rabbit, raccoon, radar, radio, radish, raft
railing, rain barrel, rainbow, rake, ram, ranch, raspberry, raven, ravine, razor, record, reed, reef, reindeer
ribbon, ridge, ring, river, robin, robot, rock, rocket, rocking chair, roof, rooster, root, rope, rose, rosemary
rowan, rowing boat, ruby, rucksack, rudder, rug, ruler, saddle, sail, salmon, sandal, sandcastle, sapling
sapphire, satchel, saucepan, saucer, saw, saxophone, scale, scarecrow, scarf, scooter, screen, screw, scroll
sculpture, seagull, seahorse, seal, seashell, seed, shack, shark, shawl, shed, sheep, shelf, shell, shepherd
shield, ship, shirt, shoe, shovel, shutter, sieve, signpost, skate, ski, skillet, skirt, sledge, sleeping bag
slide, slipper, snail, snowflake, snowman, soap dish, sock, sofa, spade, spanner, sparrow, spear, spider
spindle, spinning wheel, spoon, spring, spruce, squirrel, stable, staircase, stamp, star, starfish, statue
stencil, stool, stopwatch, stork, storm, stove, straw, stream, suitcase, summit, sundial, sunflower, swallow
swan, sword, table, tablecloth, tambourine, tangerine, tankard, tapestry, teacup, teapot, telescope, temple
tent, thimble, thistle, throne, thrush, thunder, ticket, tiger, timber, toad, toaster, tomato, torch, tortoise
toucan, towel, tower, toy box, tractor, train, tray, tree, triangle, trolley, trombone, trophy, trout, trumpet
trunk, tulip, tunnel, turbine, turnip, turret, turtle, umbrella, unicorn, valley, van, vase, vault, veil
viaduct, village, vine, viola, violet, violin, volcano, vole, waffle, wagon, waistcoat, wall, wallet, walnut
walrus, wardrobe, warehouse, watch, water bottle, waterfall, watering can, wave, weasel, well, whale, wheat
wheel, wheelbarrow, whisk, whistle, wick, willow, windmill, window, wing, wolf, woodpecker, wreath, wren, wrench
yacht, yak, yew, zebra, zipper, zither
""")

COLOURS = _split("""
red, blue, green, yellow, orange, purple, pink, brown, black, white, grey, beige, cream, ivory, gold, silver
bronze, turquoise, teal, navy blue, sky blue, olive green, mint green, burgundy, maroon, crimson, violet
lavender, coral, charcoal, mustard yellow, sand
""")

MATERIALS = _split("""
oak, pine, walnut, bamboo, plywood, cork, steel, stainless steel, cast iron, aluminium, brass, copper, bronze
silver, titanium, glass, tempered glass, ceramic, porcelain, clay, marble, granite, slate, concrete, sandstone
leather, suede, cotton, linen, wool, silk, velvet, denim, felt, canvas, polyester, nylon, rubber, silicone
recycled plastic, carbon fibre, cardboard, wicker, straw
""")

FOODS = _split("""
almonds, anchovies, apple pie, apples, apricots, artichokes, asparagus, aubergine, avocado, bacon, bagels
baked beans, bananas, barley, basil, beef stew, beetroot, biscuits, black beans, blackberries, blue cheese
blueberries, bread, bread pudding, broccoli, brown rice, brown sugar, brownies, Brussels sprouts, burritos
butter, buttermilk, butternut squash, cabbage, capers, caramel, cardamom, carrot cake, carrots, cashews
cauliflower, celery, cheddar, cheese toast, cheesecake, cherries, chestnuts, chicken curry, chicken soup
chickpeas, chilli, chives, chocolate, chocolate cake, chowder, chutney, cinnamon, clams, cloves, coconut milk
cod, coleslaw, coriander, corn, cornbread, couscous, crab cakes, cranberries, cream cheese, croissants, cucumber
cumin, currants, custard, dal, dates, dill, doughnuts, duck, dumplings, eggs, falafel, fennel, feta, figs
fish pie, flatbread, flour, focaccia, French toast, fried rice, fruit salad, garlic, garlic bread, ginger
gnocchi, goat cheese, goulash, granola, grapefruit, grapes, gravy, green beans, green tea, guacamole, halibut
ham, hazelnuts, herring, honey, hummus, ice cream, jam, kale, kebabs, kidney beans, kimchi, kiwi fruit, lamb
lasagne, leek soup, leeks, lemon juice, lemon tart, lemons, lentil soup, lentils, lettuce, lime juice, lobster
macaroni, mackerel, mangoes, maple syrup, marmalade, marzipan, mashed potatoes, meatballs, melon, meringue, milk
mint, miso soup, mozzarella, muesli, muffins, mushroom risotto, mushrooms, mussels, mustard, noodles, nutmeg
oats, olive oil, olives, omelette, onion rings, onions, orange juice, oregano, oysters, paella, pancakes, paneer
paprika, parmesan, parsley, parsnips, pasta, peaches, peanut butter, peanuts, pears, peas, pecans, pesto
pickles, pierogi, pine nuts, pineapple, pistachios, pizza, plums, polenta, pomegranate, poppy seeds, pork chops
porridge, potato salad, potatoes, prawns, pretzels, prunes, pumpkin, pumpkin soup, quiche, quinoa, radishes
raisins, ramen, raspberries, ratatouille, ravioli, red cabbage, rhubarb, rice, rice pudding, ricotta, rosemary
saffron, sage, salami, salmon, salsa, samosas, sardines, sauerkraut, sausages, scallops, scones, sea salt
sesame seeds, shallots, shortbread, shrimp, smoked salmon, sour cream, sourdough, soy sauce, spaghetti, spinach
spring rolls, strawberries, strudel, sunflower seeds, sushi, sweet potatoes, tabbouleh, tacos, tahini, tamarind
tempura, thyme, tofu, tomato sauce, tomato soup, tomatoes, tortillas, trout, tuna, turkey, turmeric, turnips
vanilla, vegetable soup, vinegar, waffles, walnuts, watercress, watermelon, wild rice, yeast, yoghurt
""")

JOB_TITLES = _split("""
accountant, actor, administrator, air traffic controller, ambulance driver, analyst, animator, archaeologist
architect, archivist, art teacher, assistant manager, astronomer, baker, bank clerk, barber, barista, beekeeper
biologist, bookkeeper, bookseller, botanist, brewer, bricklayer, bus driver, butcher, buyer, caretaker
carpenter, cashier, caterer, chef, chemist, civil engineer, cleaner, coach, cobbler, company secretary
conductor, cook, copywriter, courier, curator, customer service agent, dancer, data analyst, delivery driver
dental nurse, dentist, deputy director, designer, dietitian, director, doctor, economist, editor, electrician
estate agent, event manager, farmer, fashion designer, ferry captain, film director, finance director
firefighter, fisherman, florist, forester, gardener, geologist, glazier, goldsmith, graphic designer
hairdresser, head chef, head of marketing, head of security, head teacher, historian, hotel manager, illustrator
insurance broker, interpreter, janitor, jeweller, journalist, judge, laboratory technician, landscape architect
lawyer, librarian, lifeguard, locksmith, marine biologist, mechanic, midwife, musician, night porter, nurse
office manager, optician, painter, paramedic, park ranger, personal trainer, pharmacist, photographer
physiotherapist, pilot, plumber, police officer, porter, potter, product manager, professor, project manager
psychologist, receptionist, reporter, research assistant, sailor, sales manager, school bus driver, sculptor
social worker, software engineer, surgeon, surveyor, tailor, teacher, tour guide, train driver, translator
treasurer, vet, volunteer coordinator, waiter, warehouse manager, web developer, welder, zookeeper
""")
