from train_loop.compare.command import main

main()
