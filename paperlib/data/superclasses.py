"""Groups of labels that data sets come with: CIFAR-100's superclasses, CLINC150's domains."""

import torch
from torch import Tensor

# five labels each
SUPERCLASSES = """
beaver dolphin otter seal whale | aquarium_fish flatfish ray shark trout | orchid poppy rose sunflower tulip |
bottle bowl can cup plate | apple mushroom orange pear sweet_pepper | clock keyboard lamp telephone television |
bed chair couch table wardrobe | bee beetle butterfly caterpillar cockroach | bear leopard lion tiger wolf |
bridge castle house road skyscraper | cloud forest mountain plain sea | camel cattle chimpanzee elephant kangaroo |
fox porcupine possum raccoon skunk | crab lobster snail spider worm | baby boy girl man woman |
crocodile dinosaur lizard snake turtle | hamster mouse rabbit shrew squirrel |
maple_tree oak_tree palm_tree pine_tree willow_tree | bicycle bus motorcycle pickup_truck train |
lawn_mower rocket streetcar tank tractor
"""
# 15 labels each
DOMAINS = """
account_blocked balance bill_balance bill_due freeze_account interest_rate min_payment order_checks pay_bill
pin_change report_fraud routing spending_history transactions transfer |
application_status apr card_declined credit_limit credit_limit_change credit_score damaged_card expiration_date
improve_credit_score international_fees new_card redeem_rewards replacement_card_duration report_lost_card
rewards_balance |
accept_reservations calories cancel_reservation confirm_reservation cook_time food_last how_busy
ingredient_substitution ingredients_list meal_suggestion nutrition_info recipe restaurant_reservation
restaurant_reviews restaurant_suggestion |
calendar calendar_update next_song order order_status play_music reminder reminder_update shopping_list
shopping_list_update smart_home todo_list todo_list_update update_playlist what_song |
current_location directions distance gas gas_type jump_start last_maintenance mpg oil_change_how oil_change_when
schedule_maintenance tire_change tire_pressure traffic uber |
book_flight book_hotel car_rental carry_on exchange_rate flight_status international_visa lost_luggage plug_type
timezone translate travel_alert travel_notification travel_suggestion vaccines |
alarm calculator date definition find_phone flip_coin make_call measurement_conversion roll_dice share_location
spelling text time timer weather |
direct_deposit income insurance insurance_change meeting_schedule next_holiday payday pto_balance pto_request
pto_request_status pto_used rollover_401k schedule_meeting taxes w2 |
are_you_a_bot do_you_have_pets fun_fact goodbye greeting how_old_are_you meaning_of_life tell_joke thank_you
what_are_your_hobbies what_can_i_ask_you what_is_your_name where_are_you_from who_do_you_work_for who_made_you |
cancel change_accent change_ai_name change_language change_speed change_user_name change_volume maybe no repeat
reset_settings sync_device user_name whisper_mode yes
"""


def superclasses(classes: tuple[str, ...]) -> Tensor | None:
    """The number of each label's superclass, or domain (L,), where the labels are those of CIFAR-100, or CLINC150; None
    for other labels."""
    for names in (SUPERCLASSES, DOMAINS):
        number = {name: group for group, part in enumerate(names.split("|")) for name in part.split()}
        if set(classes) == set(number):
            return torch.tensor([number[name] for name in classes])
    return None
