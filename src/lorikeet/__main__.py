from lorikeet.cli import main

main()
